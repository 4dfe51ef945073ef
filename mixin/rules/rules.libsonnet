// Recording rules. They aggregate with `without`, so that labels of the target (instance, a platform's name) survive.
{
  local config = $._config,

  prometheusRules+:: {
    groups+: [
      {
        name: 'blueking-exporter-rules',
        rules: [
          {
            // Present while a collector succeeds in none of its scopes: every newest poll failed, or none has been complete
            // for a while (a poll that hangs takes its time to fail). The age is that at the scrape: at the evaluation it
            // would contain up to a whole scrape interval.
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
            // A job that has never succeeded is overdue max_age after it was first watched, which nothing else knows.
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
