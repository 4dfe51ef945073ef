// Can the numbers be believed? Alerts about the exporter and its way to the platform.
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
                'Nothing is known of BlueKing. Alerts about jobs and hosts cannot fire, and those that fired have resolved without meaning it. Counts are not lost: the history is read when the exporter is back.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 无法抓取',
                '此刻对蓝鲸平台一无所知：作业与主机告警不会触发，已触发的会自行恢复，但并不代表问题已解决。计数不会丢失，恢复后会补读历史。',
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
                '{{ $value }} collector(s) get through in none of their scopes. One alert in place of one for each business; the reason is in blueking_exporter_collector_errors_total.',
              ],
              zh: [
                '蓝鲸平台不应答 blueking-exporter {{ $labels.instance }}',
                '有 {{ $value }} 个采集项在所有范围都采集不到数据。此告警代替逐个业务的告警；原因见 blueking_exporter_collector_errors_total。',
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
                'Every poll of this scope fails, those of other scopes do not. Counters stand still, gauges are withheld.',
              ],
              zh: [
                '采集项 {{ $labels.collector }} 采集失败：' + lib.scope,
                '该范围的每次采集都失败，而其他范围正常。计数器停止增长，瞬时值不再提供。',
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
                'The last complete poll is more than %(staleIntervals)d intervals ago. Soon gauges are withheld, and alerts that stand on them resolve without meaning it.' % config,
              ],
              zh: [
                lib.scope + ' 的数据已有 {{ $value | humanizeDuration }} 未更新（{{ $labels.collector }}）',
                '最近一次完整采集已过去超过 %(staleIntervals)d 个周期。随后瞬时值会被撤下，依赖它们的告警会恢复，但并不代表问题已解决。' % config,
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
                'auth: the credentials of the application are refused. permission: the application may not read this API or this business. Trying again does not help.',
              ],
              zh: [
                '蓝鲸平台拒绝采集项 {{ $labels.collector }}（{{ $value }} 个范围）：{{ $labels.reason }}',
                'auth：应用凭证被拒绝。permission：应用没有该接口或该业务的查看权限。重试无济于事。',
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
                'The exporter was away for longer than max_catchup; what happened before is in no counter and never will be.',
              ],
              zh: [
                lib.scope + ' 有一段历史从未计数（{{ $labels.collector }}）',
                '采集中断超过 max_catchup；更早发生的执行不在任何计数器中，也不会再补。',
              ],
            },
          ),
          alert(
            'BlueKingHistoryTruncated',
            'warning',
            lib.grew('blueking_exporter_collector_truncated_total', config.historyWindow, config.restartLabels),
            {
              en: [
                'BlueKing did not give the history of ' + lib.scope + ' completely ({{ $labels.collector }})',
                'Executions were counted without their host results, or more lie in one millisecond than the API lists. Counts of hosts are too low by these.',
              ],
              zh: [
                '蓝鲸平台未完整给出 ' + lib.scope + ' 的历史（{{ $labels.collector }}）',
                '部分执行在没有主机结果的情况下计数，或同一毫秒内的执行多于接口可列出的数量；主机计数因此偏低。',
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
                lib.rounded + ' refusals within %(errorWindow)s. The quota is shared with whoever uses the same application; data becomes late.' % config,
              ],
              zh: [
                '蓝鲸网关对 blueking-exporter {{ $labels.instance }} 限流',
                '%(errorWindow)s 内被拒绝 ' % config + lib.rounded + ' 次。配额由使用同一应用的各方共享；数据会变迟。',
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
                'The platform is newer than the exporter, or a row is broken. A status that is not known counts as a failure once it has an end time.',
              ],
              zh: [
                '蓝鲸平台的字段 {{ $labels.field }} 出现 blueking-exporter 不认识的值',
                '平台版本比采集器新，或数据行有误。不认识的状态一旦有结束时间即按失败计数。',
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
                'The page has reached max_series, so the detail of some hosts or watched jobs is missing. The counts beside them stay exact.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 省略了 {{ $labels.family }} 的部分序列',
                '页面达到 max_series，部分主机或关注作业的明细缺失；汇总计数仍然准确。',
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
                'What cannot be committed is not counted: polls fail until the state can be written. The disk may be full or read-only.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 无法写入状态',
                '无法提交的内容不会计数：在状态可写之前采集持续失败。磁盘可能已满或只读。',
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
                'It goes on with the old one. After a restart it would not start.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 拒绝了新配置',
                '仍在使用旧配置；若重启将无法启动。',
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
                'blueking-exporter {{ $labels.instance }} shows no scope: its lease has lapsed',
                'Redis or Valkey does not confirm its heartbeats. If the other replicas are well, they have taken over; if all are in this state, nothing is known of BlueKing. Counts are not lost.',
              ],
              zh: [
                'blueking-exporter {{ $labels.instance }} 的租约已失效，不展示任何范围',
                'Redis 或 Valkey 不再确认其心跳。其他副本正常时已由它们接管；若全部如此，则对蓝鲸平台一无所知。计数不会丢失。',
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
                'They are on no page. Replicas may be missing, cut off from Redis or Valkey, or have different configurations.',
              ],
              zh: [
                '有 {{ $value }} 个范围没有任何 blueking-exporter 副本采集',
                '这些范围不在任何页面上。可能是副本不足、无法连接 Redis 或 Valkey，或各副本配置不同。',
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
                'Each keeps to its own scopes and rates. After a change all of them need the new file.',
              ],
              zh: [
                'blueking-exporter 的各副本使用了 {{ $value }} 份不同的配置',
                '各副本按自己的范围与速率采集。修改配置后须更新全部副本。',
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
                'Shards of blueking-exporter are missing, doubled, or differ in their number',
                'Each of the shards 0 to total - 1 must run once. Scopes of a missing one are on no page, those of a doubled one are counted twice.',
              ],
              zh: [
                'blueking-exporter 的分片缺失、重复，或分片总数不一致',
                '分片 0 至 total - 1 必须各运行一个。缺失分片的范围不在任何页面上，重复分片的范围会被计两次。',
              ],
            },
            config.shardsFor,
          ),
        ],
      },
    ],
  },
}
