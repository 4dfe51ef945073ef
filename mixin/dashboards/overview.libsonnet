// All businesses, with links to each of them.
local g = import 'grafana.libsonnet';
local sel = g.exporter;
local failed = 'status=~"failed|abnormal|unknown"';

g.dashboard(
  'blueking-overview',
  'Overview · 总览',
  'All scopes that blueking-exporter polls. blueking-exporter 轮询的全部范围。',
  [],
  [
    g.section('Now · 当前', [
      g.stat(
        'Scopes · 范围数',
        'Businesses and business sets that are polled. 轮询的业务与业务集。',
        'short',
        g.instant('count(blueking_scope_info{%s})' % sel)
      ),
      g.stat(
        'Oldest data · 最旧数据',
        'Time since the last complete poll, the largest of all. 距最近一次完整轮询的时间，取最大值。',
        's',
        g.instant('max(time() - blueking_exporter_collector_last_success_timestamp_seconds{%s})' % sel),
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
        'Hosts whose newest result in JOB is a failure. 最新作业结果为失败的主机。',
        'short',
        g.instant('sum(blueking_job_hosts_failing{%s})' % sel),
        [[1, 'orange']]
      ),
      g.stat(
        'Unfinished · 未结束',
        'Executions that have not ended, including those that wait for a person. 未结束的执行，含等待人工确认的执行。',
        'short',
        g.instant('sum(blueking_job_executions_unfinished{%s})' % sel)
      ),
    ]),
    g.section('Businesses · 业务', [
      g.details(
        'Businesses · 业务一览',
        'One row per scope. Counts are for the time range. 每个范围一行；次数按时间范围统计。',
        [
          g.table('blueking_scope_info{%s}' % sel),
          g.table('sum by (bk_scope_type, bk_scope_id) (increase(blueking_job_executions_finished_total{%s}[$__range]))' % sel),
          g.table(|||
            sum by (bk_scope_type, bk_scope_id) (increase(blueking_job_executions_finished_total{%(sel)s, %(failed)s}[$__range]))
            /
            (sum by (bk_scope_type, bk_scope_id) (increase(blueking_job_executions_finished_total{%(sel)s}[$__range])) > 0)
          ||| % { sel: sel, failed: failed }),
          g.table('sum by (bk_scope_type, bk_scope_id) (blueking_job_hosts_failing{%s})' % sel),
          g.table('sum by (bk_scope_type, bk_scope_id) (blueking_job_executions_unfinished{%s})' % sel),
          g.table('max by (bk_scope_type, bk_scope_id) (time() - blueking_exporter_collector_last_success_timestamp_seconds{%s})' % sel),
        ],
        [
          ['bk_scope_type', 'Type · 类型', 'string'],
          ['bk_scope_id', 'ID', 'string'],
          ['name', 'Name · 名称', 'string'],
          ['Value #B', 'Executions · 执行次数', 'short'],
          ['Value #C', 'Failed · 失败率', 'percentunit'],
          ['Value #D', 'Hosts failing · 失败主机', 'short'],
          ['Value #E', 'Unfinished · 未结束', 'short'],
          ['Value #F', 'Data age · 数据时效', 's'],
        ],
        { bk_scope_id: g.toBusiness }
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
        'Failed, by business · 各业务失败',
        'Executions per second that failed. 每秒失败的执行。',
        'ops',
        [g.range(
          'topk(10, sum by (bk_scope_type, bk_scope_id) (rate(blueking_job_executions_finished_total{%s, %s}[$__rate_interval])))' % [sel, failed],
          '{{bk_scope_type}} {{bk_scope_id}}'
        )]
      ),
      g.timeseries(
        'Started, by launch mode · 按启动方式',
        'Executions seen for the first time, per second: web (people), api (programs), cron (schedules). 每秒首次发现的执行：web 页面、api 接口、cron 定时。',
        'ops',
        [g.range('sum by (launch_mode) (rate(blueking_job_executions_created_total{%s}[$__rate_interval]))' % sel, '{{launch_mode}}')],
        stacked=true
      ),
      g.timeseries(
        'Oldest unfinished · 最久未结束',
        'Time since the creation of the oldest execution in each status. 各状态中最早的执行自创建以来的时间。',
        's',
        [g.range('max by (status) (time() - blueking_job_oldest_unfinished_timestamp_seconds{%s})' % sel, '{{status}}')]
      ),
    ]),
    g.section('Hosts · 主机', [
      g.timeseries(
        'Hosts failing, by reason · 失败主机（按原因）',
        'Exact. Not limited by max_failing_hosts. 精确值，不受 max_failing_hosts 限制。',
        'short',
        [g.range('sum by (code, reason) (blueking_job_hosts_failing{%s})' % sel, '{{reason}} ({{code}})')],
        stacked=true
      ),
      g.timeseries(
        'Hosts failing, by business · 失败主机（按业务）',
        'The ten scopes with most failing hosts. 失败主机最多的十个范围。',
        'short',
        [g.range('topk(10, sum by (bk_scope_type, bk_scope_id) (blueking_job_hosts_failing{%s}))' % sel, '{{bk_scope_type}} {{bk_scope_id}}')]
      ),
    ]),
    g.section('Watched jobs · 关注作业', [
      g.details(
        'Watched jobs · 关注作业',
        'Jobs listed under watch in the configuration. 配置中 watch 列出的作业。',
        [
          g.table('max by (bk_scope_type, bk_scope_id, job_name) (time() - blueking_job_watched_last_finished_timestamp_seconds{%s, outcome="success"})' % sel),
          g.table('max by (bk_scope_type, bk_scope_id, job_name) (time() - blueking_job_watched_last_finished_timestamp_seconds{%s, outcome="failure"})' % sel),
          g.table('max by (bk_scope_type, bk_scope_id, job_name) (blueking_job_watched_max_age_seconds{%s})' % sel),
          g.table('max by (bk_scope_type, bk_scope_id, job_name) (blueking_job_watched_last_duration_seconds{%s})' % sel),
          g.table('max by (bk_scope_type, bk_scope_id, job_name) (blueking_job_watched_unfinished{%s})' % sel),
          g.table('max by (bk_scope_type, bk_scope_id, job_name) (time() - blueking_job_watched_unfinished_since_timestamp_seconds{%s})' % sel),
        ],
        [
          ['bk_scope_type', 'Type · 类型', 'string'],
          ['bk_scope_id', 'ID', 'string'],
          ['job_name', 'Job · 作业', 'string'],
          ['Value #A', 'Since success · 距上次成功', 's'],
          ['Value #B', 'Since failure · 距上次失败', 's'],
          ['Value #C', 'max_age · 上限', 's'],
          ['Value #D', 'Duration · 耗时', 's'],
          ['Value #E', 'Unfinished · 未结束', 'short'],
          ['Value #F', 'Running for · 已执行', 's'],
        ],
        { bk_scope_id: g.toBusiness }
      ),
    ]),
  ]
)
