// Alerts about JOB.
local lib = import 'alert.libsonnet';
{
  local config = $._config,
  local alert(name, severity, expr, texts, duration='0s', failures=null) =
    lib.alert(config, name, 'job', severity, expr, texts, duration, failures),

  prometheusAlerts+:: {
    groups+: [
      {
        name: 'blueking-job',
        rules: [
          alert(
            'BlueKingJobFailureRateHigh',
            'warning',
            |||
              scope:blueking_job_executions_failed:ratio_increase%(failureRateWindow)s > %(failureRate)g
              and
              scope:blueking_job_executions_finished:increase%(failureRateWindow)s >= %(failureRateMinimum)d
            ||| % config,
            {
              en: [
                '{{ $value | humanizePercentage }} of the executions of ' + lib.scope + ' failed',
                'Within the last %(failureRateWindow)s. A business with fewer than %(failureRateMinimum)d executions fires no alert.' % config,
              ],
              zh: [
                lib.scope + ' 有 {{ $value | humanizePercentage }} 的作业执行失败',
                '统计最近 %(failureRateWindow)s；执行少于 %(failureRateMinimum)d 次的业务不告警。' % config,
              ],
            },
            config.failureRateFor,
            failures={ collector: 'job' },
          ),
          alert(
            'BlueKingJobHostRepeatedlyFailing',
            'warning',
            // Failures in a row, with the code and reason of the newest one.
            |||
              blueking_job_host_consecutive_failures
                * ignoring (code, reason) group_right ()
                (blueking_job_host_failing_since_timestamp_seconds > bool 0)
              >= %(hostConsecutiveFailures)d
            ||| % config,
            {
              en: [
                'Host {{ $labels.ip }} of ' + lib.scope + ' failed {{ $value }} executions in a row: {{ $labels.reason }}',
                'Host id {{ $labels.bk_host_id }}, cloud area {{ $labels.bk_cloud_id }}, status code {{ $labels.code }} ({{ $labels.reason }}). The alert resolves when an execution succeeds on it.',
              ],
              zh: [
                lib.scope + ' 的主机 {{ $labels.ip }} 连续 {{ $value }} 次执行失败：' + lib.codeText,
                '主机 ID {{ $labels.bk_host_id }}，管控区域 {{ $labels.bk_cloud_id }}，状态码 {{ $labels.code }}（{{ $labels.reason }}）。该主机上有一次执行成功即恢复。',
              ],
            },
            failures={ collector: 'job', text: '{{ $labels.ip }}' },
          ),
          alert(
            'BlueKingJobAgentOutage',
            'critical',
            |||
              sum without (code, reason) (
                blueking_job_hosts_failing{reason=~"agent_abnormal|agent_not_installed|gse_agent_abnormal"}
              ) >= %(agentOutageHosts)d
            ||| % config,
            {
              en: [
                '{{ $value }} hosts of ' + lib.scope + ' fail because of their agent',
                'So many failures at once often have one cause. Check the network, the proxy of the cloud area and GSE first, then the hosts.',
              ],
              zh: [
                lib.scope + ' 有 {{ $value }} 台主机因 Agent 异常而失败',
                '如此多的主机同时异常，多半是同一原因：先查网络、管控区域的 Proxy 与 GSE，再查主机。',
              ],
            },
            config.agentOutageFor,
            failures={ collector: 'job', text: 'agent' },
          ),
          alert(
            'BlueKingJobStuck',
            'warning',
            // Executions in these two statuses wait for a person.
            |||
              time() - blueking_job_oldest_unfinished_timestamp_seconds{status!~"waiting_user|rolling_waiting"}
                > %(stuckSeconds)d
            ||| % config,
            {
              en: [
                'An execution of ' + lib.scope + ' has been {{ $labels.status }} for {{ $value | humanizeDuration }}',
                'It does not wait for a confirmation. It may block others: a lock, a maintenance window, the next run of a schedule.',
              ],
              zh: [
                lib.scope + ' 有作业执行处于 {{ $labels.status }} 已 {{ $value | humanizeDuration }}',
                '它不是在等待人工确认。它可能阻塞其他操作：锁、维护窗口、定时任务的下一次执行。',
              ],
            },
            config.stuckFor,
          ),
          alert(
            'BlueKingJobWatchedOverdue',
            'critical',
            |||
              time() - blueking_job_watched_last_finished_timestamp_seconds{outcome="success"}
                > ignoring (outcome) blueking_job_watched_max_age_seconds
              or
              (
                time() - job_name:blueking_job_watched:first_seen_timestamp_seconds
                  > blueking_job_watched_max_age_seconds
              )
                unless ignoring (outcome) blueking_job_watched_last_finished_timestamp_seconds{outcome="success"}
            |||,
            {
              en: [
                'Job {{ $labels.job_name }} of ' + lib.scope + ' has not succeeded for {{ $value | humanizeDuration }}',
                'This is longer than its max_age. It failed, still runs, or was not started. If it has never succeeded, the time counts from when it was first watched.',
              ],
              zh: [
                lib.scope + ' 的作业 {{ $labels.job_name }} 已 {{ $value | humanizeDuration }} 未成功',
                '超过其 max_age：可能失败、仍在执行或根本未启动。若从未成功过，则自首次关注之时起算。',
              ],
            },
            failures={ collector: 'job' },
          ),
          alert(
            'BlueKingJobWatchedFailed',
            'warning',
            |||
              time() - blueking_job_watched_last_finished_timestamp_seconds{outcome="failure"}
              unless ignoring (outcome)
              (
                blueking_job_watched_last_finished_timestamp_seconds{outcome="success"}
                  >= ignoring (outcome) blueking_job_watched_last_finished_timestamp_seconds{outcome="failure"}
              )
            |||,
            {
              en: [
                'Job {{ $labels.job_name }} of ' + lib.scope + ' failed {{ $value | humanizeDuration }} ago',
                'Its newest result is a failure. The alert resolves with its next success.',
              ],
              zh: [
                lib.scope + ' 的作业 {{ $labels.job_name }} 于 {{ $value | humanizeDuration }} 前失败',
                '其最新结果为失败。下一次成功即恢复。',
              ],
            },
            failures={ collector: 'job' },
          ),
        ],
      },
    ],
  },
}
