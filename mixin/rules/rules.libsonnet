// Recording rules. They aggregate with `without`, so that labels of the target (instance, a platform's name) survive.
{
  local config = $._config,

  prometheusRules+:: {
    groups+: [
      {
        name: 'blueking-exporter-rules',
        rules: [
          {
            // Exists while a collector succeeds in none of its scopes: either the newest poll of every scope has failed, or
            // no poll has been complete for some time (a poll that hangs fails late). The age is computed from the time of
            // the scrape: with the time of the evaluation it would be too large by up to a scrape interval.
            record: 'collector:blueking_exporter_unreachable',
            expr: |||
              max without (bk_scope_type, bk_scope_id) (blueking_exporter_collector_success) == 0
              or
              min without (bk_scope_type, bk_scope_id) (
                timestamp(blueking_exporter_collector_last_success_timestamp_seconds)
                - blueking_exporter_collector_last_success_timestamp_seconds
              ) > %(unreachableIntervals)g * avg without (bk_scope_type, bk_scope_id) (blueking_exporter_collector_interval_seconds)
            ||| % config,
          },
          {
            record: 'scope:blueking_job_executions_finished:increase' + config.failureRateWindow,
            expr: |||
              sum without (task_type, launch_mode, status) (
                increase(blueking_job_executions_finished_total[%(failureRateWindow)s])
              )
            ||| % config,
          },
          {
            record: 'scope:blueking_job_executions_failed:ratio_increase' + config.failureRateWindow,
            expr: |||
              sum without (task_type, launch_mode, status) (
                increase(blueking_job_executions_finished_total{status=~"failed|abnormal|unknown"}[%(failureRateWindow)s])
              )
              /
              (scope:blueking_job_executions_finished:increase%(failureRateWindow)s > 0)
            ||| % config,
          },
          {
            // A job that has never succeeded is overdue max_age after it was first watched. Only this rule records that time.
            record: 'job_name:blueking_job_watched:first_seen_timestamp_seconds',
            expr: |||
              last_over_time(job_name:blueking_job_watched:first_seen_timestamp_seconds[1d])
                and blueking_job_watched_max_age_seconds
              or
              timestamp(blueking_job_watched_max_age_seconds)
            |||,
          },
        ],
      },
    ],
  },
}
