// One business: executions, durations, failures, failing hosts and reasons.
local g = import 'grafana.libsonnet';
local sel = g.scope;
local failed = 'status=~"failed|abnormal|unknown"';

g.dashboard(
  'blueking-business',
  'Business · 业务',
  'JOB in one business. 单个业务的作业平台。',
  [
    g.variable('bk_scope_type', 'Type · 类型', 'label_values(blueking_scope_info{%s}, bk_scope_type)' % g.exporter),
    g.variable('bk_scope_id', 'ID', 'label_values(blueking_scope_info{%s, bk_scope_type="$bk_scope_type"}, bk_scope_id)' % g.exporter),
  ],
  [
    g.section('Now · 当前', [
      g.stat(
        'Name · 名称',
        'From the configuration. 配置中的名称。',
        'string',
        g.instant('blueking_scope_info{%s}' % sel, '{{name}}'),
      ) { options+: { textMode: 'name' } },
      g.stat(
        'Data age · 数据时效',
        'Time since the last complete poll of JOB. 距作业平台最近一次完整轮询的时间。',
        's',
        g.instant('max(time() - blueking_exporter_collector_last_success_timestamp_seconds{%s, collector="job"})' % sel),
        [[180, 'orange'], [600, 'red']]
      ),
      g.stat(
        'Executions · 执行次数',
        'Executions that ended in the time range. 时间范围内结束的执行。',
        'short',
        g.instant('sum(increase(blueking_job_executions_finished_total{%s}[$__range]))' % sel)
      ),
      g.stat(
        'Failed · 失败率',
        'Share of the executions in the time range that failed. 时间范围内失败的执行所占的比例。',
        'percentunit',
        g.instant(|||
          sum(increase(blueking_job_executions_finished_total{%(sel)s, %(failed)s}[$__range]))
          /
          sum(increase(blueking_job_executions_finished_total{%(sel)s}[$__range]))
        ||| % { sel: sel, failed: failed }),
        [[0.05, 'orange'], [0.2, 'red']]
      ),
      g.stat(
        'Hosts failing · 失败主机',
        'Hosts whose newest result is a failure. 最新结果为失败的主机。',
        'short',
        g.instant('sum(blueking_job_hosts_failing{%s})' % sel),
        [[1, 'orange']]
      ),
      g.stat(
        'Unfinished · 未结束',
        'Executions that have not ended. 未结束的执行。',
        'short',
        g.instant('sum(blueking_job_executions_unfinished{%s})' % sel)
      ),
    ]),
    g.section('Failing hosts · 失败主机', [
      g.details(
        'Failing hosts · 失败主机明细',
        'The hosts that have failed longest, up to max_failing_hosts. The page /failures of the exporter lists all of them, with links to the executions. 失败时间最长的主机，至多 max_failing_hosts 台；exporter 的 /failures 页面列出全部主机，并有执行的链接。',
        [
          g.table('max by (bk_cloud_id, bk_host_id, ip, code, reason) (blueking_job_host_failing_since_timestamp_seconds{%s}) * 1000' % sel),
          g.table(|||
            max by (bk_cloud_id, bk_host_id, ip) (blueking_job_host_consecutive_failures{%(sel)s})
              * on (bk_cloud_id, bk_host_id, ip) group_right ()
              (max by (bk_cloud_id, bk_host_id, ip, code, reason) (blueking_job_host_failing_since_timestamp_seconds{%(sel)s}) > bool 0)
          ||| % { sel: sel }),
        ],
        [
          ['ip', 'IP', 'string'],
          ['bk_cloud_id', 'Cloud area · 管控区域', 'string'],
          ['bk_host_id', 'Host ID · 主机 ID', 'string'],
          ['code', 'Code · 状态码', 'string'],
          ['reason', 'Reason · 原因', 'string'],
          ['Value #A', 'Failing since · 起始时间', 'dateTimeAsIso'],
          ['Value #B', 'In a row · 连续次数', 'short'],
        ]
      ),
      g.timeseries(
        'Hosts failing, by reason · 失败主机（按原因）',
        'Exact. Not limited by max_failing_hosts. 精确值，不受 max_failing_hosts 限制。',
        'short',
        [g.range('sum by (code, reason) (blueking_job_hosts_failing{%s})' % sel, '{{reason}} ({{code}})')],
        stacked=true
      ),
      g.bars(
        'Failed host results, by reason · 主机失败结果（按原因）',
        'In the time range. 时间范围内。',
        'short',
        g.instant('sort_desc(sum by (code, reason) (increase(blueking_job_host_failures_total{%s}[$__range])))' % sel, '{{reason}} ({{code}})')
      ),
      g.details(
        'What the codes mean · 状态码含义',
        'The table of host status codes of JOB. 作业平台的主机状态码表。',
        [g.table('blueking_job_status_code_info{%s}' % g.exporter)],
        [
          ['code', 'Code · 状态码', 'string'],
          ['reason', 'Reason · 原因', 'string'],
          ['category', 'Category · 类别', 'string'],
          ['text_zh', '平台文案', 'string'],
        ]
      ) { width:: 12 },
      g.bars(
        'Exit codes · 退出码',
        'Exit codes of failed host results in script steps, in the time range. 时间范围内脚本步骤失败结果的退出码。',
        'short',
        g.instant('sort_desc(sum by (exit_code) (increase(blueking_job_host_exit_codes_total{%s}[$__range])))' % sel, '{{exit_code}}')
      ),
    ]),
    g.section('Executions · 作业执行', [
      g.timeseries(
        'Ended, by status · 按状态结束',
        'Executions per second that reached a terminal status. 每秒结束的执行。',
        'ops',
        [g.range('sum by (status) (rate(blueking_job_executions_finished_total{%s}[$__rate_interval]))' % sel, '{{status}}')],
        stacked=true
      ),
      g.timeseries(
        'Started, by type and launch mode · 按类型与启动方式',
        'Executions seen for the first time, per second. 每秒首次发现的执行。',
        'ops',
        [g.range('sum by (task_type, launch_mode) (rate(blueking_job_executions_created_total{%s}[$__rate_interval]))' % sel, '{{task_type}} / {{launch_mode}}')],
        stacked=true
      ),
      g.timeseries(
        'Unfinished, by status · 未结束（按状态）',
        'Executions that have not ended. 未结束的执行。',
        'short',
        [g.range('sum by (status) (blueking_job_executions_unfinished{%s})' % sel, '{{status}}')],
        stacked=true
      ),
      g.timeseries(
        'Oldest unfinished · 最久未结束',
        'Time since the creation of the oldest execution in each status. Executions in waiting_user and rolling_waiting wait for a person. 各状态中最早的执行自创建以来的时间；waiting_user 与 rolling_waiting 在等待人工。',
        's',
        [g.range('max by (status) (time() - blueking_job_oldest_unfinished_timestamp_seconds{%s})' % sel, '{{status}}')]
      ),
      g.timeseries(
        'Failed steps, by type · 失败步骤（按类型）',
        'Failed steps of the executions that host_results selects, per second. host_results 所选执行中每秒失败的步骤。',
        'ops',
        [g.range('sum by (step_type) (rate(blueking_job_step_failures_total{%s}[$__rate_interval]))' % sel, '{{step_type}}')]
      ),
      g.timeseries(
        'Reopened, lost · 重新运行与放弃',
        'reopened: finished executions that ran again. lost: unfinished executions that are too old, or that the platform no longer has. reopened：结束后重新运行的执行。lost：未结束而过旧，或平台上已不存在的执行。',
        'short',
        [
          g.range('sum(increase(blueking_job_executions_reopened_total{%s}[$__rate_interval]))' % sel, 'reopened'),
          g.range('sum(increase(blueking_job_executions_lost_total{%s}[$__rate_interval]))' % sel, 'lost'),
        ]
      ),
    ]),
    g.section('Durations · 耗时', [
      g.timeseries(
        'Duration, by type · 耗时（按类型）',
        'From start to first end: 50th and 95th percentile. Exemplars contain the execution id. 从开始到首次结束：P50 与 P95；exemplar 含执行 ID。',
        's',
        [
          g.range('histogram_quantile(0.5, sum by (task_type, le) (rate(blueking_job_execution_duration_seconds_bucket{%s}[$__rate_interval])))' % sel, '{{task_type}} p50'),
          g.range('histogram_quantile(0.95, sum by (task_type, le) (rate(blueking_job_execution_duration_seconds_bucket{%s}[$__rate_interval])))' % sel, '{{task_type}} p95') { exemplar: true },
        ]
      ),
      g.heatmap(
        'Distribution of durations · 耗时分布',
        'Executions that ended, by duration. 结束的执行按耗时分布。',
        g.range('sum by (le) (increase(blueking_job_execution_duration_seconds_bucket{%s}[$__rate_interval]))' % sel)
      ),
      g.timeseries(
        'Waiting time, by type · 等待时长（按类型）',
        'From creation to start: 50th and 95th percentile. 从创建到开始：P50 与 P95。',
        's',
        [
          g.range('histogram_quantile(0.5, sum by (task_type, le) (rate(blueking_job_execution_wait_seconds_bucket{%s}[$__rate_interval])))' % sel, '{{task_type}} p50'),
          g.range('histogram_quantile(0.95, sum by (task_type, le) (rate(blueking_job_execution_wait_seconds_bucket{%s}[$__rate_interval])))' % sel, '{{task_type}} p95'),
        ]
      ),
      g.heatmap(
        'Distribution of waiting times · 等待时长分布',
        'Executions that started, by waiting time. 开始的执行按等待时长分布。',
        g.range('sum by (le) (increase(blueking_job_execution_wait_seconds_bucket{%s}[$__rate_interval]))' % sel)
      ),
    ]),
    g.section('Watched jobs · 关注作业', [
      g.timeseries(
        'Since the last success · 距上次成功',
        'Time since the newest success of each watched job, and its max_age. 关注作业距上次成功的时间，及其 max_age。',
        's',
        [
          g.range('max by (job_name) (time() - blueking_job_watched_last_finished_timestamp_seconds{%s, outcome="success"})' % sel, '{{job_name}}'),
          g.range('max by (job_name) (blueking_job_watched_max_age_seconds{%s})' % sel, '{{job_name}} max_age'),
        ]
      ),
      g.timeseries(
        'Duration of watched jobs · 关注作业耗时',
        'Duration of the newest execution. 最近一次执行的耗时。',
        's',
        [g.range('max by (job_name) (blueking_job_watched_last_duration_seconds{%s})' % sel, '{{job_name}}')]
      ),
      g.timeseries(
        'Running watched jobs · 执行中的关注作业',
        'Time since the start of the oldest execution that has not ended (before the start: since its creation). 最早的未结束执行自开始以来的时间（未开始则自创建起）。',
        's',
        [g.range('max by (job_name) (time() - blueking_job_watched_unfinished_since_timestamp_seconds{%s})' % sel, '{{job_name}}')]
      ),
      g.timeseries(
        'Unfinished executions of watched jobs · 关注作业的未结束执行',
        'Executions that have not ended. 未结束的执行。',
        'short',
        [g.range('sum by (job_name) (blueking_job_watched_unfinished{%s})' % sel, '{{job_name}}')]
      ),
    ]),
  ]
)
