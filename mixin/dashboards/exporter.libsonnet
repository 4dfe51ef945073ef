// The exporter itself: is what it shows true and fresh, and what does it cost?
local g = import 'grafana.libsonnet';
local sel = g.exporter;
// A counter with labels is absent until its first event: nothing happened, which is shown as 0.
local orNone(expr, label) = '%s or label_replace(vector(0), "%s", "none", "", "")' % [expr, label];

g.dashboard(
  'blueking-exporter',
  'Exporter · 采集器',
  'Freshness, calls to BlueKing, state, cost. 时效、对蓝鲸的调用、状态与开销。',
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
        'Of the exporter. 采集器版本。',
        'string',
        g.instant('blueking_exporter_build_info{%s}' % sel, '{{version}}')
      ) { options+: { textMode: 'name' } },
      g.stat(
        'Pollers failing · 失败的采集',
        'Collectors and scopes whose last poll was not complete. 最近一次采集不完整的采集项与范围。',
        'short',
        g.instant('count(blueking_exporter_collector_success{%s}) - sum(blueking_exporter_collector_success{%s})' % [sel, sel]),
        [[1, 'red']]
      ),
      g.stat(
        'Oldest data · 最旧数据',
        'Time since the last complete poll, the oldest of all. 距最近一次完整采集，取最旧者。',
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
        'History in the time range that was given up, all scopes together. 时间范围内放弃的历史总时长。',
        's',
        g.instant('sum(increase(blueking_exporter_collector_gap_seconds_total{%s}[$__range]))' % sel),
        [[1, 'red']]
      ),
    ]),
    g.section('Freshness · 时效', [
      g.details(
        'Pollers · 采集项与范围',
        'Age: since the last complete poll. Lag: how far counting is behind the present. 时效：距最近完整采集；滞后：计数落后于当前的时间。',
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
          ['Value #D', 'Interval · 周期', 's'],
          ['Value #E', 'Poll took · 采集耗时', 's'],
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
        'Polls and calls that failed, per second. 每秒失败的采集与调用。',
        'ops',
        [g.range(orNone('sum by (reason) (rate(blueking_exporter_collector_errors_total{%s}[$__rate_interval]))' % sel, 'reason'), '{{reason}}')]
      ),
      g.timeseries(
        'Run time of polls · 采集耗时',
        'The ten slowest; longer than the interval means late. 最慢的十个；超过周期即推迟。',
        's',
        [g.range('topk(10, blueking_exporter_collector_duration_seconds{%s})' % sel, '{{collector}} {{bk_scope_type}} {{bk_scope_id}}')]
      ),
      g.timeseries(
        'Not complete, not known · 截断与未知值',
        'History and executions that the platform did not give completely; values that this version does not know. 平台未完整给出的内容；本版本不认识的值。',
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
        'Per second; none: no answer came. 每秒；none 表示没有应答。',
        'reqps',
        [g.range('sum by (code) (rate(blueking_exporter_api_requests_total{%s}[$__rate_interval]))' % sel, '{{code}}')],
        stacked=true
      ),
      g.timeseries(
        'Latency · 时延',
        'Of 99 of 100 requests, without waiting for the rate budget. P99，不含限速等待。',
        's',
        [g.range('histogram_quantile(0.99, sum by (api, le) (rate(blueking_exporter_api_request_duration_seconds_bucket{%s}[$__rate_interval])))' % sel, '{{api}}')]
      ),
      g.timeseries(
        'Waiting for the rate budget · 限速等待',
        'Seconds of waiting per second, all requests together; retries beside it. 每秒累计等待秒数；以及重试。',
        'short',
        [
          g.range('sum(rate(blueking_exporter_api_throttle_seconds_total{%s}[$__rate_interval]))' % sel, 'waiting'),
          g.range(orNone('sum by (api) (rate(blueking_exporter_api_retries_total{%s}[$__rate_interval]))' % sel, 'api'), 'retries {{api}}'),
        ]
      ),
      g.timeseries(
        'Quota left · 剩余配额',
        'As the gateway told with its last answer. 网关最近一次应答给出的剩余配额。',
        'short',
        [g.range('min by (api) (blueking_exporter_api_quota_remaining{%s})' % sel, '{{api}}')]
      ),
      g.timeseries(
        'Clock difference · 时钟偏差',
        'Clock of the exporter minus that of BlueKing; windows are laid in the platform\'s time. 采集器时钟减平台时钟；时间窗口按平台时间。',
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
        'State on disk, and the last page uncompressed. 磁盘状态与最近一次页面（未压缩）。',
        'bytes',
        [
          g.range('sum(blueking_exporter_state_bytes{%s})' % sel, 'state'),
          g.range('max(blueking_exporter_exposition_bytes{%s})' % sel, 'page'),
        ]
      ),
      g.timeseries(
        'Series, by family · 序列（按指标）',
        'The ten largest families on the page. 页面上最大的十个指标。',
        'short',
        [g.range('topk(10, sum by (family) (blueking_exporter_series{%s}))' % sel, '{{family}}')],
        stacked=true
      ),
      g.timeseries(
        'Series left out · 省略的序列',
        'Because of max_series. 因 max_series 而省略。',
        'short',
        [g.range(orNone('sum by (family) (increase(blueking_exporter_series_dropped_total{%s}[$__rate_interval]))' % sel, 'family'), '{{family}}')]
      ),
      g.timeseries(
        'Time to answer · 应答时间',
        'Putting a page together; how late the event loop woke up. 组装页面的时间；事件循环迟到的时间。',
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
        'Resident. 常驻内存。',
        'bytes',
        [g.range('process_resident_memory_bytes{%s}' % sel, '{{instance}}')]
      ),
      g.timeseries(
        'Open files · 打开的文件',
        'And how many there may be. 以及上限。',
        'short',
        [
          g.range('process_open_fds{%s}' % sel, 'open'),
          g.range('process_max_fds{%s}' % sel, 'limit'),
        ]
      ),
    ]),
  ]
)
