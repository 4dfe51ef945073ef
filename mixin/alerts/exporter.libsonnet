// Alerts about the exporter and its access to the platform: whether the numbers are right.
local lib = import 'alert.libsonnet';
{
  local config = $._config,
  local alert(name, severity, expr, texts, duration='0s') =
    lib.alert(config, name, 'exporter', severity, expr, texts, duration),

  prometheusAlerts+:: {
    groups+: [
      {
        name: 'blueking-exporter',
        rules: [
          alert(
            'BlueKingExporterDown',
            'critical',
            |||
              up{%(exporterSelector)s} == 0
              or
              absent(up{%(exporterSelector)s})
            ||| % config,
            {
              en: [
                'blueking-exporter {{ $labels.instance }} cannot be scraped',
                'There is no data about BlueKing. Alerts about jobs and hosts cannot fire, and firing ones resolve although the problem is not solved. Counts are not lost: the exporter reads the history when it is back.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 无法抓取',
                '当前没有蓝鲸平台的任何数据：作业与主机告警不会触发，已触发的会自行恢复，但并不代表问题已解决。计数不会丢失，exporter 恢复后会补读历史。',
              ],
            },
            config.exporterDownFor,
          ),
          alert(
            'BlueKingPlatformUnreachable',
            'critical',
            'count without (collector) (collector:blueking_exporter_unreachable)',
            {
              en: [
                'BlueKing does not answer blueking-exporter {{ $labels.instance }}',
                '{{ $value }} collector(s) cannot poll any of their scopes. This one alert stands for all businesses. The reason is in blueking_exporter_collector_errors_total.',
              ],
              zh: [
                '蓝鲸平台不响应 blueking-exporter {{ $labels.instance }}',
                '有 {{ $value }} 个采集项在所有范围的轮询都失败。此告警代替逐个业务的告警。原因见 blueking_exporter_collector_errors_total。',
              ],
            },
            config.platformUnreachableFor,
          ),
          alert(
            'BlueKingCollectorFailing',
            'warning',
            'blueking_exporter_collector_success == 0\n' + lib.unlessEverywhere,
            {
              en: [
                'Collector {{ $labels.collector }} fails for ' + lib.scope,
                'Every poll of this scope fails; polls of other scopes succeed. Counters do not increase, gauges are not exposed.',
              ],
              zh: [
                '采集项 {{ $labels.collector }} 轮询失败：' + lib.scope,
                '该范围的每次轮询都失败，其他范围正常。计数器不再增长，gauge 不再提供。',
              ],
            },
            config.collectorFailingFor,
          ),
          alert(
            'BlueKingDataStale',
            'warning',
            |||
              timestamp(blueking_exporter_collector_last_success_timestamp_seconds)
                - blueking_exporter_collector_last_success_timestamp_seconds
                > %(staleIntervals)d * blueking_exporter_collector_interval_seconds
            ||| % config + lib.unlessEverywhere,
            {
              en: [
                'Data of ' + lib.scope + ' is {{ $value | humanizeDuration }} old ({{ $labels.collector }})',
                'The last complete poll is more than %(staleIntervals)d intervals ago. Gauges will disappear soon. Alerts on them will resolve although the problem is not solved.' % config,
              ],
              zh: [
                lib.scope + ' 的数据已有 {{ $value | humanizeDuration }} 未更新（{{ $labels.collector }}）',
                '最近一次完整轮询已过去超过 %(staleIntervals)d 个间隔。随后 gauge 会消失，依赖它们的告警会恢复，但并不代表问题已解决。' % config,
              ],
            },
            config.staleFor,
          ),
          alert(
            'BlueKingPermissionLost',
            'critical',
            |||
              count without (bk_scope_type, bk_scope_id) (
                increase(blueking_exporter_collector_errors_total{reason=~"auth|permission"}[%(errorWindow)s]) > 0
              )
            ||| % config,
            {
              en: [
                'BlueKing refuses {{ $labels.collector }} in {{ $value }} scope(s): {{ $labels.reason }}',
                'auth: the credentials of the application are refused. permission: the application may not read this API or this business. Retries do not help.',
              ],
              zh: [
                '蓝鲸平台拒绝采集项 {{ $labels.collector }}（{{ $value }} 个范围）：{{ $labels.reason }}',
                'auth：应用凭证被拒绝。permission：应用没有该接口或该业务的查看权限。重试没有用。',
              ],
            },
          ),
          alert(
            'BlueKingHistoryGap',
            'warning',
            lib.grew('blueking_exporter_collector_gap_seconds_total', config.historyWindow, config.restartLabels),
            {
              en: [
                'Part of the history of ' + lib.scope + ' was never counted ({{ $labels.collector }})',
                'The exporter did not poll for longer than max_catchup. Executions before that time are in no counter and will not be counted later.',
              ],
              zh: [
                lib.scope + ' 有一段历史从未计数（{{ $labels.collector }}）',
                '轮询中断超过 max_catchup。更早的执行不在任何计数器中，以后也不会计入。',
              ],
            },
          ),
          alert(
            'BlueKingHistoryTruncated',
            'warning',
            lib.grew('blueking_exporter_collector_truncated_total', config.historyWindow, config.restartLabels),
            {
              en: [
                'BlueKing did not return the complete history of ' + lib.scope + ' ({{ $labels.collector }})',
                'Some executions were counted without their host results, or one millisecond contains more executions than the API lists. The counts of hosts are too low.',
              ],
              zh: [
                '蓝鲸平台未完整返回 ' + lib.scope + ' 的历史（{{ $labels.collector }}）',
                '部分执行计数时没有主机结果，或同一毫秒内的执行多于接口可列出的数量。主机计数因此偏低。',
              ],
            },
          ),
          alert(
            'BlueKingExporterRateLimited',
            'warning',
            |||
              sum without (api, code) (
                increase(blueking_exporter_api_requests_total{code="429"}[%(errorWindow)s]) > 0
              )
              or
              sum without (collector, bk_scope_type, bk_scope_id, reason) (
                increase(blueking_exporter_collector_errors_total{reason="rate_limited"}[%(errorWindow)s]) > 0
              )
            ||| % config,
            {
              en: [
                'BlueKing limits the rate of blueking-exporter {{ $labels.instance }}',
                lib.rounded + ' calls were refused within %(errorWindow)s. All users of the same application share its quota. Data is late.' % config,
              ],
              zh: [
                '蓝鲸网关对 blueking-exporter {{ $labels.instance }} 限流',
                '%(errorWindow)s 内被拒绝 ' % config + lib.rounded + ' 次。使用同一应用的各方共享配额。数据会延迟。',
              ],
            },
            config.rateLimitedFor,
          ),
          alert(
            'BlueKingExporterUnknownValues',
            'warning',
            lib.grew('blueking_exporter_unknown_values_total', config.historyWindow),
            {
              en: [
                'BlueKing sends values in {{ $labels.field }} that blueking-exporter does not know',
                'The platform is newer than the exporter, or a row is invalid. An execution with an unknown status and an end time counts as a failure.',
              ],
              zh: [
                '蓝鲸平台的字段 {{ $labels.field }} 出现 blueking-exporter 不认识的值',
                '平台版本比 exporter 新，或数据行有误。状态未知而有结束时间的执行按失败计数。',
              ],
            },
          ),
          alert(
            'BlueKingExporterSeriesLimit',
            'warning',
            lib.grew('blueking_exporter_series_dropped_total', config.historyWindow),
            {
              en: [
                'blueking-exporter {{ $labels.instance }} leaves out series of {{ $labels.family }}',
                '/metrics has reached max_series, so the series of some hosts or watched jobs are missing. The counts of hosts and executions stay exact.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 省略了 {{ $labels.family }} 的部分序列',
                '/metrics 达到 max_series，部分主机或关注作业的序列缺失。主机与执行的计数仍然准确。',
              ],
            },
          ),
          alert(
            'BlueKingExporterStateNotWritten',
            'critical',
            'increase(blueking_exporter_state_write_errors_total[%(errorWindow)s]) > 0' % config,
            {
              en: [
                'blueking-exporter {{ $labels.instance }} cannot write its state',
                'Polls fail and nothing is counted until the state can be written. The disk may be full or read-only.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 无法写入状态',
                '在状态可写之前，轮询持续失败，也不会计数。磁盘可能已满或只读。',
              ],
            },
          ),
          alert(
            'BlueKingExporterReloadFailed',
            'warning',
            'blueking_exporter_config_last_reload_successful == 0',
            {
              en: [
                'blueking-exporter {{ $labels.instance }} refuses its new configuration',
                'It keeps using the old one. If you restart it now, it will not start.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 拒绝了新配置',
                'exporter 仍在使用旧配置。此时重启将无法启动。',
              ],
            },
            config.reloadFailedFor,
          ),
          alert(
            'BlueKingExporterLeaseLost',
            'critical',
            'blueking_exporter_lease_valid == 0',
            {
              en: [
                'blueking-exporter {{ $labels.instance }} exposes no scope: its lease has expired',
                'Redis or Valkey does not confirm its heartbeats. If other replicas work, they have taken over its scopes. If no replica works, there is no data about BlueKing. Counts are not lost.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 的租约已失效，不展示任何范围',
                'Redis 或 Valkey 不再确认其心跳。如果其他副本正常，它们已接管其范围。如果所有副本都如此，则没有蓝鲸平台的任何数据。计数不会丢失。',
              ],
            },
            config.leaseLostFor,
          ),
          alert(
            'BlueKingExporterScopesUnowned',
            'critical',
            |||
              max without (%(restartLabels)s) (blueking_exporter_scopes_configured)
              -
              sum without (%(restartLabels)s) (blueking_exporter_scopes_owned)
                > 0
            ||| % config,
            {
              en: [
                '{{ $value }} scope(s) are polled by no replica of blueking-exporter',
                'No replica exposes them. Replicas may be missing, may not reach Redis or Valkey, or may have different configurations.',
              ],
              zh: [
                '有 {{ $value }} 个范围没有任何 blueking-exporter 副本轮询',
                '没有副本展示这些范围。可能是副本不足、无法连接 Redis 或 Valkey，或各副本配置不同。',
              ],
            },
            config.unownedFor,
          ),
          alert(
            'BlueKingExporterConfigDiffers',
            'warning',
            |||
              count without (sha256) (
                count without (%(restartLabels)s) (
                  blueking_exporter_config_info
                    and ignoring (sha256) (blueking_exporter_lease_valid or blueking_exporter_total_shards > 1)
                )
              ) > 1
            ||| % config,
            {
              en: [
                'Replicas of blueking-exporter have {{ $value }} different configurations',
                'Each replica uses the scopes and rate limits of its own configuration. After a change give the new file to all replicas.',
              ],
              zh: [
                'blueking-exporter 的各副本使用了 {{ $value }} 份不同的配置',
                '各副本使用各自配置中的范围与速率限制。修改配置后须更新全部副本。',
              ],
            },
            config.configDiffersFor,
          ),
          alert(
            'BlueKingExporterShards',
            'critical',
            |||
              count without (shard) (
                count_values without (%(restartLabels)s) (
                  "shard", blueking_exporter_shard_ordinal and blueking_exporter_total_shards > 1
                )
              )
                != max without (%(restartLabels)s) (blueking_exporter_total_shards > 1)
              or
              count without (%(restartLabels)s) (blueking_exporter_total_shards > 1)
                != max without (%(restartLabels)s) (blueking_exporter_total_shards > 1)
              or
              min without (%(restartLabels)s) (blueking_exporter_total_shards)
                != max without (%(restartLabels)s) (blueking_exporter_total_shards > 1)
            ||| % config,
            {
              en: [
                'Shards of blueking-exporter are missing, run twice, or have different total numbers',
                'Each of the shards 0 to total - 1 must run exactly once. Nothing exposes the scopes of a missing shard. The scopes of a shard that runs twice are counted twice.',
              ],
              zh: [
                'blueking-exporter 的分片缺失、重复，或分片总数不一致',
                '分片 0 至 total - 1 必须各运行一个。缺失分片的范围没有数据，重复分片的范围会被计两次。',
              ],
            },
            config.shardsFor,
          ),
        ],
      },
    ],
  },
}
