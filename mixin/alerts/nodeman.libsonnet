// Alerts about NodeMan.
local lib = import 'alert.libsonnet';
{
  local config = $._config,
  local alert(name, severity, expr, texts, duration='0s', failures=null) =
    lib.alert(config, name, 'nodeman', severity, expr, texts, duration, failures),

  prometheusAlerts+:: {
    groups+: [
      {
        name: 'blueking-nodeman',
        rules: [
          alert(
            'BlueKingNodemanInstallFailing',
            'warning',
            // Job types of the platform: INSTALL_AGENT, REINSTALL_PROXY, MAIN_INSTALL_PLUGIN …, install_agent in V3.
            |||
              sum without (job_type, code) (
                increase(blueking_nodeman_host_failures_total{job_type=~"((RE|MAIN_)?INSTALL|install)_.+"}[%(nodemanInstallWindow)s])
              ) >= %(nodemanInstallFailures)d
            ||| % config,
            {
              en: [
                lib.rounded + ' installs of ' + lib.scope + ' failed at step {{ $labels.step }}',
                'Within the last %(nodemanInstallWindow)s. The step is the first one that failed on the host.' % config,
              ],
              zh: [
                lib.scope + ' 有 ' + lib.rounded + ' 次安装失败于步骤 {{ $labels.step }}',
                '统计最近 %(nodemanInstallWindow)s；步骤为主机上首个失败的子步骤。' % config,
              ],
            },
            failures={ collector: '{{ $labels.collector }}', text: '{{ $labels.step }}' },
          ),
          alert(
            'BlueKingNodemanJobStuck',
            'warning',
            |||
              time() - (
                blueking_nodeman_oldest_unfinished_timestamp_seconds
                or blueking_nodemgr_oldest_unfinished_timestamp_seconds
              ) > %(nodemanStuckSeconds)d
            ||| % config,
            {
              en: [
                'A NodeMan job of ' + lib.scope + ' has been running for {{ $value | humanizeDuration }}',
                'Installs usually take minutes. Until it ends, its hosts cannot be used, and nobody can retry.',
              ],
              zh: [
                lib.scope + ' 有节点管理任务已运行 {{ $value | humanizeDuration }}',
                '安装通常只需几分钟。在它结束之前，其主机不可用，也无法重试。',
              ],
            },
            config.nodemanStuckFor,
          ),
          alert(
            'BlueKingNodemanSubscriptionFailing',
            'warning',
            |||
              sum without (status) (
                blueking_nodeman_subscription_instances{status=~"failed|part_failed"}
              ) > 0
            |||,
            {
              en: [
                '{{ $value }} instances of NodeMan subscription {{ $labels.subscription_id }} of ' + lib.scope + ' failed',
                'The policy is not applied on these hosts: the plugin is missing or has an old version.',
              ],
              zh: [
                lib.scope + ' 的节点管理订阅 {{ $labels.subscription_id }} 有 {{ $value }} 个实例失败',
                '策略在这些主机上未生效：插件缺失或版本过旧。',
              ],
            },
            config.nodemanSubscriptionFor,
            failures={ collector: 'nodeman_subscription' },
          ),
        ],
      },
    ],
  },
}
