// The exporter itself: how fresh its data is, and what it costs.
local g = import 'grafana.libsonnet';
local sel = g.exporter;
// A counter with labels is absent until its first event. Until then the panel shows 0.
local orNone(expr, label) = '%s or label_replace(vector(0), "%s", "none", "", "")' % [expr, label];

g.dashboard(
  'blueking-exporter',
  'Exporter',
  'Freshness of data, calls to BlueKing, state, resources. 数据时效、对蓝鲸的调用、状态与资源占用。',
  [],
  [
    g.section('Now · 当前', [
      g.stat(
        'Up · 可抓取',
        'Whether Prometheus can scrape it. Prometheus 能否抓取。',
        'short',
        g.instant('min(up{%s})' % sel),
        mappings=[{ type: 'value', options: { '0': { text: 'down', color: 'red', index: 0 }, '1': { text: 'up', color: 'green', index: 1 } } }]
      ),
      g.stat(
        'Version · 版本',
        'Version of the exporter. exporter 的版本。',
        'string',
        g.instant('blueking_exporter_build_info{%s}' % sel, '{{version}}')
      ) { options+: { textMode: 'name' } },
      g.stat(
        'Pollers failing · 失败的轮询',
        'Collectors and scopes whose last poll failed. 最近一次轮询失败的采集项与范围。',
        'short',
        g.instant('count(blueking_exporter_collector_success{%s}) - sum(blueking_exporter_collector_success{%s})' % [sel, sel]),
        [[1, 'red']]
      ),
      g.stat(
        'Oldest data · 最旧数据',
        'Time since the last complete poll, the largest of all. 距最近一次完整轮询的时间，取最大值。',
        's',
        g.instant('max(time() - blueking_exporter_collector_last_success_timestamp_seconds{%s})' % sel),
        [[180, 'orange'], [600, 'red']]
      ),
      g.stat(
        'Configuration · 配置',
        'Whether the last reload succeeded. 最近一次加载是否成功。',
        'short',
        g.instant('min(blueking_exporter_config_last_reload_successful{%s})' % sel),
        mappings=[{ type: 'value', options: { '0': { text: 'refused', color: 'red', index: 0 }, '1': { text: 'loaded', color: 'green', index: 1 } } }]
      ),
      g.stat(
        'Never counted · 未计数历史',
        'Length of history that was skipped in the time range, sum of all scopes. 时间范围内跳过的历史时长，所有范围之和。',
        's',
        g.instant('sum(increase(blueking_exporter_collector_gap_seconds_total{%s}[$__range]))' % sel),
        [[1, 'red']]
      ),
    ]),
    g.section('Freshness · 时效', [
      g.details(
        'Pollers · 采集项与范围',
        'Age: time since the last complete poll. Lag: how far counting is behind the present. 时效：距最近一次完整轮询的时间；滞后：计数落后于当前的时间。',
        [
          g.table('max by (collector, bk_scope_type, bk_scope_id) (blueking_exporter_collector_success{%s})' % sel),
          g.table('max by (collector, bk_scope_type, bk_scope_id) (time() - blueking_exporter_collector_last_success_timestamp_seconds{%s})' % sel),
          g.table('max by (collector, bk_scope_type, bk_scope_id) (time() - blueking_exporter_collector_watermark_timestamp_seconds{%s})' % sel),
          g.table('max by (collector, bk_scope_type, bk_scope_id) (blueking_exporter_collector_interval_seconds{%s})' % sel),
          g.table('max by (collector, bk_scope_type, bk_scope_id) (blueking_exporter_collector_duration_seconds{%s})' % sel),
        ],
        [
          ['collector', 'Collector · 采集项', 'string'],
          ['bk_scope_type', 'Type · 类型', 'string'],
          ['bk_scope_id', 'ID', 'string'],
          ['Value #A', 'Success · 成功', 'short'],
          ['Value #B', 'Age · 时效', 's'],
          ['Value #C', 'Lag · 滞后', 's'],
          ['Value #D', 'Interval · 间隔', 's'],
          ['Value #E', 'Poll duration · 轮询耗时', 's'],
        ],
        { bk_scope_id: g.toBusiness }
      ),
      g.timeseries(
        'Age of data · 数据时效',
        'The ten oldest. 最旧的十个。',
        's',
        [g.range('topk(10, time() - blueking_exporter_collector_last_success_timestamp_seconds{%s})' % sel, '{{collector}} {{bk_scope_type}} {{bk_scope_id}}')]
      ),
      g.timeseries(
        'Errors, by reason · 错误（按原因）',
        'Polls and calls that failed, per second. 每秒失败的轮询与调用。',
        'ops',
        [g.range(orNone('sum by (reason) (rate(blueking_exporter_collector_errors_total{%s}[$__rate_interval]))' % sel, 'reason'), '{{reason}}')]
      ),
      g.timeseries(
        'Poll duration · 轮询耗时',
        'The ten slowest. If it is longer than the interval, the next poll is late. 最慢的十个；超过间隔则下次轮询推迟。',
        's',
        [g.range('topk(10, blueking_exporter_collector_duration_seconds{%s})' % sel, '{{collector}} {{bk_scope_type}} {{bk_scope_id}}')]
      ),
      g.timeseries(
        'Truncated and unknown values · 截断与未知值',
        'truncated: objects that the platform did not return completely. unknown: values that this version does not know. truncated：平台未完整返回的对象。unknown：本版本不认识的值。',
        'short',
        [
          g.range('sum(increase(blueking_exporter_collector_truncated_total{%s}[$__rate_interval]))' % sel, 'truncated'),
          g.range(orNone('sum by (field) (increase(blueking_exporter_unknown_values_total{%s}[$__rate_interval]))' % sel, 'field'), 'unknown {{field}}'),
        ]
      ),
    ]),
    g.section('Calls to BlueKing · 对蓝鲸的调用', [
      g.timeseries(
        'Requests, by operation · 请求（按接口）',
        'Per second. 每秒。',
        'reqps',
        [g.range('sum by (api) (rate(blueking_exporter_api_requests_total{%s}[$__rate_interval]))' % sel, '{{api}}')],
        stacked=true
      ),
      g.timeseries(
        'Requests, by HTTP status · 请求（按状态码）',
        'Per second. none: no response. 每秒；none 表示没有响应。',
        'reqps',
        [g.range('sum by (code) (rate(blueking_exporter_api_requests_total{%s}[$__rate_interval]))' % sel, '{{code}}')],
        stacked=true
      ),
      g.timeseries(
        'Latency · 时延',
        '99th percentile, without the wait for the rate limit. P99，不含限速等待。',
        's',
        [g.range('histogram_quantile(0.99, sum by (api, le) (rate(blueking_exporter_api_request_duration_seconds_bucket{%s}[$__rate_interval])))' % sel, '{{api}}')]
      ),
      g.timeseries(
        'Waiting for the rate limit · 限速等待',
        'waiting: seconds of waiting per second, sum of all requests. retries: per second. waiting：每秒累计等待的秒数。retries：每秒重试次数。',
        'short',
        [
          g.range('sum(rate(blueking_exporter_api_throttle_seconds_total{%s}[$__rate_interval]))' % sel, 'waiting'),
          g.range(orNone('sum by (api) (rate(blueking_exporter_api_retries_total{%s}[$__rate_interval]))' % sel, 'api'), 'retries {{api}}'),
        ]
      ),
      g.timeseries(
        'Quota left · 剩余配额',
        'From the newest response of the gateway. 网关最近一次响应给出的剩余配额。',
        'short',
        [g.range('min by (api) (blueking_exporter_api_quota_remaining{%s})' % sel, '{{api}}')]
      ),
      g.timeseries(
        'Clock difference · 时钟偏差',
        'Clock of the exporter minus clock of BlueKing. Time windows use the clock of BlueKing. exporter 时钟减平台时钟；时间窗口按平台时钟。',
        's',
        [g.range('blueking_exporter_api_clock_skew_seconds{%s}' % sel, '{{instance}}')]
      ) { fieldConfig+: { defaults+: { min:: 0 } } },
    ]),
    g.section('State and page · 状态与页面', [
      g.timeseries(
        'Writes of the state · 状态写入',
        'Transactions per second. 每秒事务数。',
        'ops',
        [
          g.range('sum(rate(blueking_exporter_state_writes_total{%s}[$__rate_interval]))' % sel, 'committed'),
          g.range('sum(rate(blueking_exporter_state_write_errors_total{%s}[$__rate_interval]))' % sel, 'failed'),
        ]
      ),
      g.timeseries(
        'Size · 大小',
        'State on disk; newest /metrics page, uncompressed. 磁盘上的状态；最近一次 /metrics 页面（未压缩）。',
        'bytes',
        [
          g.range('sum(blueking_exporter_state_bytes{%s})' % sel, 'state'),
          g.range('max(blueking_exporter_exposition_bytes{%s})' % sel, 'page'),
        ]
      ),
      g.timeseries(
        'Series, by family · 序列（按指标）',
        'The ten largest families on /metrics. /metrics 上最大的十个指标。',
        'short',
        [g.range('topk(10, sum by (family) (blueking_exporter_series{%s}))' % sel, '{{family}}')],
        stacked=true
      ),
      g.timeseries(
        'Dropped series · 省略的序列',
        'Series dropped because of max_series. 因 max_series 而省略的序列。',
        'short',
        [g.range(orNone('sum by (family) (increase(blueking_exporter_series_dropped_total{%s}[$__rate_interval]))' % sel, 'family'), '{{family}}')]
      ),
      g.timeseries(
        'Response time · 响应时间',
        'render: assembly of the page. event loop lag: how late the event loop runs. scrape: as Prometheus measures it. render：组装页面。event loop lag：事件循环的延迟。scrape：Prometheus 测得的抓取耗时。',
        's',
        [
          g.range('max(blueking_exporter_render_duration_seconds{%s})' % sel, 'render'),
          g.range('max(blueking_exporter_event_loop_lag_seconds{%s})' % sel, 'event loop lag'),
          g.range('max(scrape_duration_seconds{%s})' % sel, 'scrape'),
        ]
      ),
      g.timeseries(
        'Processor · CPU',
        'Seconds of processor time per second. 每秒占用的处理器秒数。',
        's',
        [g.range('rate(process_cpu_seconds_total{%s}[$__rate_interval])' % sel, '{{instance}}')]
      ),
      g.timeseries(
        'Memory · 内存',
        'Resident memory. 常驻内存。',
        'bytes',
        [g.range('process_resident_memory_bytes{%s}' % sel, '{{instance}}')]
      ),
      g.timeseries(
        'Open files · 打开的文件',
        'Open file descriptors and their limit. 打开的文件描述符及其上限。',
        'short',
        [
          g.range('process_open_fds{%s}' % sel, 'open'),
          g.range('process_max_fds{%s}' % sel, 'limit'),
        ]
      ),
    ]),
  ]
)
