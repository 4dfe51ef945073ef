// NodeMan: installs of agents and plugins, and the steps at which they fail.
local g = import 'grafana.libsonnet';
local sel = g.exporter + ', bk_scope_id=~"$bk_scope_id"';

g.dashboard(
  'blueking-nodeman',
  'NodeMan · 节点管理',
  'Installs of agents and plugins: jobs and subscriptions of NodeMan 2.x, tasks of 1.x, workflows of V3. Agent 与插件安装：2.x 任务与订阅、1.x 任务、V3 工作流。',
  [
    g.variable(
      'bk_scope_id',
      'Business · 业务',
      'label_values(blueking_exporter_collector_success{%s, collector=~"nodeman_.+|nodemgr"}, bk_scope_id)' % g.exporter,
      all=true
    ),
  ],
  [
    g.section('Now · 当前', [
      g.stat(
        'Data age · 数据时效',
        'Time since the last complete poll, the largest of all. 距最近一次完整轮询的时间，取最大值。',
        's',
        g.instant('max(time() - blueking_exporter_collector_last_success_timestamp_seconds{%s, collector=~"nodeman_.+|nodemgr"})' % sel),
        [[300, 'orange'], [900, 'red']]
      ),
      g.stat(
        'Jobs unfinished · 未结束任务',
        'Pending or running. 等待或执行中。',
        'short',
        g.instant('sum(blueking_nodeman_jobs_unfinished{%s})' % sel)
      ),
      g.stat(
        'Oldest unfinished · 最久未结束',
        'Time since the start of the oldest job that has not ended. 最早的未结束任务自开始以来的时间。',
        's',
        g.instant('max(time() - blueking_nodeman_oldest_unfinished_timestamp_seconds{%s})' % sel),
        [[3600, 'red']]
      ),
      g.stat(
        'Hosts failing · 失败主机',
        'Hosts whose newest result is a failure. 最新结果为失败的主机。',
        'short',
        g.instant('sum(blueking_nodeman_hosts_failing{%s})' % sel),
        [[1, 'orange']]
      ),
      g.stat(
        'Failed instances of subscriptions · 订阅失败实例',
        'Of the configured subscriptions. 配置的订阅中失败的实例。',
        'short',
        g.instant('sum(blueking_nodeman_subscription_instances{%s, status=~"failed|part_failed"}) or vector(0)' % sel),
        [[1, 'orange']]
      ),
      g.stat(
        'Jobs ended · 结束任务',
        'In the time range. 时间范围内。',
        'short',
        g.instant('sum(increase(blueking_nodeman_jobs_finished_total{%s}[$__range]))' % sel)
      ),
    ]),
    g.section('Failures · 失败', [
      g.details(
        'Failing hosts · 失败主机明细',
        'The hosts that have failed longest, up to max_failing_hosts. Hosts of NodeMan 1.x have no id. The page /failures of the exporter lists all of them, with links to the jobs. 失败时间最长的主机，至多 max_failing_hosts 台；1.x 主机没有 ID。exporter 的 /failures 页面列出全部主机，并有任务的链接。',
        [g.table('max by (bk_scope_id, collector, bk_cloud_id, bk_host_id, ip, job_type, step, code) (blueking_nodeman_host_failing_since_timestamp_seconds{%s}) * 1000' % sel)],
        [
          ['bk_scope_id', 'Business · 业务', 'string'],
          ['collector', 'Collector · 采集项', 'string'],
          ['ip', 'IP', 'string'],
          ['bk_cloud_id', 'Cloud area · 管控区域', 'string'],
          ['bk_host_id', 'Host ID · 主机 ID', 'string'],
          ['job_type', 'Operation · 操作', 'string'],
          ['step', 'Step · 步骤', 'string'],
          ['code', 'Code · 错误码', 'string'],
          ['Value', 'Failing since · 起始时间', 'dateTimeAsIso'],
        ]
      ),
      g.timeseries(
        'Hosts failing, by step · 失败主机（按步骤）',
        'Exact. Not limited by max_failing_hosts. The step is the first one that failed. 精确值，不受 max_failing_hosts 限制；步骤为首个失败的子步骤。',
        'short',
        [g.range('sum by (step) (blueking_nodeman_hosts_failing{%s})' % sel, '{{step}}')],
        stacked=true
      ),
      g.bars(
        'Failed host results, by operation and step · 主机失败结果（按操作与步骤）',
        'In the time range. 时间范围内。',
        'short',
        g.instant('sort_desc(sum by (job_type, step) (increase(blueking_nodeman_host_failures_total{%s}[$__range])))' % sel, '{{job_type}} {{step}}')
      ),
    ]),
    g.section('Jobs · 任务', [
      g.timeseries(
        'Ended, by status · 按状态结束',
        'Jobs per second that reached a terminal status. 每秒结束的任务。',
        'ops',
        [g.range('sum by (status) (rate(blueking_nodeman_jobs_finished_total{%s}[$__rate_interval]))' % sel, '{{status}}')],
        stacked=true
      ),
      g.timeseries(
        'Unfinished, by operation · 未结束（按操作）',
        'Pending or running. 等待或执行中。',
        'short',
        [g.range('sum by (job_type) (blueking_nodeman_jobs_unfinished{%s})' % sel, '{{job_type}}')],
        stacked=true
      ),
      g.timeseries(
        'Hosts of jobs, by status · 任务主机（按状态）',
        'Hosts of unfinished and recently finished jobs. 未结束与近期结束任务的主机数。',
        'short',
        [g.range('sum by (status) (blueking_nodeman_job_instances{%s})' % sel, '{{status}}')],
        stacked=true
      ),
      g.timeseries(
        'Duration, by operation · 耗时（按操作）',
        '95th percentile, first run of a job only. P95，仅任务的首次运行。',
        's',
        [g.range('histogram_quantile(0.95, sum by (job_type, le) (rate(blueking_nodeman_job_duration_seconds_bucket{%s}[$__rate_interval])))' % sel, '{{job_type}}')]
      ),
      g.bars(
        'Time per step · 各步骤平均耗时',
        'Average over the time range, of the sub-steps that were read. 时间范围内已读取的子步骤的平均值。',
        's',
        g.instant(|||
          sort_desc(
            sum by (step) (increase(blueking_nodeman_step_duration_seconds_sum{%(sel)s}[$__range]))
            /
            (sum by (step) (increase(blueking_nodeman_step_duration_seconds_count{%(sel)s}[$__range])) > 0)
          )
        ||| % { sel: sel }, '{{step}}')
      ),
      g.timeseries(
        'Duration of steps · 步骤耗时',
        '95th percentile of the ten slowest sub-steps. 最慢的十个子步骤的 P95。',
        's',
        [g.range('topk(10, histogram_quantile(0.95, sum by (step, le) (rate(blueking_nodeman_step_duration_seconds_bucket{%s}[$__rate_interval]))))' % sel, '{{step}}')]
      ),
    ]),
    g.section('NodeMan V3 · 节点管理 V3', [
      g.timeseries(
        'Workflows ended, by status · 结束的工作流（按状态）',
        'Workflows per second that ended. node: agents and proxies. 每秒结束的工作流；node 为 Agent 与 Proxy。',
        'ops',
        [g.range('sum by (domain, status) (rate(blueking_nodemgr_workflows_finished_total{%s}[$__rate_interval]))' % sel, '{{domain}} {{status}}')],
        stacked=true
      ),
      g.timeseries(
        'Unfinished workflows, by type · 未结束的工作流（按类型）',
        'Workflows that have not ended. 未结束的工作流。',
        'short',
        [g.range('sum by (domain, workflow_type) (blueking_nodemgr_workflows_unfinished{%s})' % sel, '{{domain}} {{workflow_type}}')],
        stacked=true
      ),
      g.timeseries(
        'Oldest unfinished workflow · 最早的未结束工作流',
        'Time since the start of the oldest workflow that has not ended. 最早的未结束工作流自开始以来的时间。',
        's',
        [g.range('max by (domain) (time() - blueking_nodemgr_oldest_unfinished_timestamp_seconds{%s})' % sel, '{{domain}}')]
      ),
      g.timeseries(
        'Duration of workflows, by type · 工作流耗时（按类型）',
        '95th percentile, first run of a workflow only. P95，仅工作流的首次运行。',
        's',
        [g.range('histogram_quantile(0.95, sum by (workflow_type, le) (rate(blueking_nodemgr_workflow_duration_seconds_bucket{%s}[$__rate_interval])))' % sel, '{{workflow_type}}')]
      ),
      g.bars(
        'Failed operations, by type and step · 失败的操作（按类型与步骤）',
        'In the time range. 时间范围内。',
        'short',
        g.instant('sort_desc(sum by (job_type, step, code) (increase(blueking_nodeman_host_failures_total{%s, collector="nodemgr"}[$__range])))' % sel, '{{job_type}} {{step}} {{code}}')
      ),
      g.timeseries(
        'Workflows reopened, lost · 重新运行与放弃的工作流',
        'reopened: finished workflows that ran again. lost: unfinished workflows that are too old, or that the platform no longer has. reopened：结束后重新运行的工作流。lost：未结束而过旧，或平台上已不存在的工作流。',
        'short',
        [
          g.range('sum(increase(blueking_nodemgr_workflows_reopened_total{%s}[$__rate_interval]))' % sel, 'reopened'),
          g.range('sum(increase(blueking_nodemgr_workflows_lost_total{%s}[$__rate_interval])) or vector(0)' % sel, 'lost'),
        ]
      ),
    ]),
    g.section('Watched jobs · 关注任务', [
      g.timeseries(
        'Hosts of watched jobs · 关注任务的主机',
        'Of the configured job_ids, by status. 配置的 job_ids，按状态。',
        'short',
        [g.range('sum by (job_id, status) (blueking_nodeman_watched_job_instances{%s})' % sel, '{{job_id}} {{status}}')]
      ),
      g.details(
        'Status of watched jobs · 关注任务的状态',
        'The present status of each of the configured job_ids. 配置的 job_ids 的当前状态。',
        [g.table('max by (bk_scope_id, job_id, job_type, status) (blueking_nodeman_watched_job_status{%s})' % sel)],
        [
          ['bk_scope_id', 'Business · 业务', 'string'],
          ['job_id', 'Job · 任务', 'string'],
          ['job_type', 'Operation · 操作', 'string'],
          ['status', 'Status · 状态', 'string'],
        ]
      ) { width:: 12 },
    ]),
    g.section('Subscriptions and NodeMan 1.x · 订阅与 1.x', [
      g.timeseries(
        'Instances of subscriptions · 订阅实例',
        'By status. 按状态。',
        'short',
        [g.range('sum by (subscription_id, status) (blueking_nodeman_subscription_instances{%s})' % sel, '{{subscription_id}} {{status}}')]
      ),
      g.timeseries(
        'Since the last run of subscriptions · 距订阅上次执行',
        'Time since the newest end of an instance. 距最近一次实例结束的时间。',
        's',
        [g.range('max by (subscription_id) (time() - blueking_nodeman_subscription_last_finished_timestamp_seconds{%s})' % sel, '{{subscription_id}}')]
      ),
      g.timeseries(
        'Hosts of 1.x tasks · 1.x 任务主机',
        'By status, of the configured tasks. 配置的任务按状态。',
        'short',
        [g.range('sum by (job_id, status) (blueking_nodeman_task_hosts{%s})' % sel, '{{job_id}} {{status}}')]
      ),
      g.timeseries(
        'Hosts of 1.x tasks, by system · 1.x 任务主机（按系统）',
        'Of the configured tasks. 配置的任务按操作系统。',
        'short',
        [g.range('sum by (os_type) (blueking_nodeman_task_hosts_by_os{%s})' % sel, '{{os_type}}')]
      ),
    ]),
  ]
)
