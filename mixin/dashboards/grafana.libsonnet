// Grafana dashboards as plain data: panels, variables, and a layout that cannot overlap.
// Titles are "English · 中文". Panels are placed from left to right in rows of 24 cells; coordinates are computed.
{
  local datasource = { type: 'prometheus', uid: '${datasource}' },

  // The exporters that the variables of the dashboard select.
  exporter:: 'job="$job", instance=~"$instance"',
  scope:: self.exporter + ', bk_scope_type="$bk_scope_type", bk_scope_id="$bk_scope_id"',

  // Queries. `legend` is not needed where a panel shows labels itself.
  range(expr, legend='__auto'):: { expr: expr, legendFormat: legend, range: true },
  instant(expr, legend='__auto'):: { expr: expr, legendFormat: legend, instant: true },
  table(expr):: { expr: expr, format: 'table', instant: true },

  local panel(type, title, description, unit, queries, options, defaults={}, overrides=[]) = {
    type: type,
    title: title,
    description: description,
    datasource: datasource,
    fieldConfig: { defaults: { unit: unit } + defaults, overrides: overrides },
    options: options,
    targets: [
      { refId: std.char(65 + index), datasource: datasource, editorMode: 'code' } + queries[index]
      for index in std.range(0, std.length(queries) - 1)
    ],
    width:: 12,
    height:: 8,
  },

  stat(title, description, unit, query, thresholds=[], mappings=[])::
    panel(
      'stat', title, description, unit, [query], {
        colorMode: if thresholds == [] then 'none' else 'value',
        graphMode: 'none',
        justifyMode: 'auto',
        orientation: 'auto',
        reduceOptions: { calcs: ['lastNotNull'], fields: '', values: false },
        textMode: 'auto',
        wideLayout: true,
      }, {
        mappings: mappings,
        thresholds: {
          mode: 'absolute',
          steps: [{ color: 'green', value: null }] + [{ color: step[1], value: step[0] } for step in thresholds],
        },
      }
    ) { width:: 4, height:: 4 },

  timeseries(title, description, unit, queries, stacked=false)::
    panel(
      'timeseries', title, description, unit, queries, {
        legend: { calcs: ['lastNotNull', 'max'], displayMode: 'table', placement: 'bottom', showLegend: true },
        tooltip: { mode: 'multi', sort: 'desc' },
      }, {
        min: 0,
        custom: {
          drawStyle: 'line',
          fillOpacity: if stacked then 30 else 5,
          lineWidth: 1,
          showPoints: 'never',
          spanNulls: false,
          stacking: { group: 'A', mode: if stacked then 'normal' else 'none' },
        },
      }
    ),

  bars(title, description, unit, query)::
    panel(
      'bargauge', title, description, unit, [query], {
        displayMode: 'basic',
        orientation: 'horizontal',
        reduceOptions: { calcs: ['lastNotNull'], fields: '', values: false },
        showUnfilled: true,
        valueMode: 'color',
      }, { min: 0, thresholds: { mode: 'absolute', steps: [{ color: 'blue', value: null }] } }
    ),

  heatmap(title, description, query)::
    panel(
      'heatmap', title, description, 'short', [query { format: 'heatmap', legendFormat: '{{le}}' }], {
        calculate: false,
        cellGap: 1,
        color: { exponent: 0.5, fill: 'dark-orange', mode: 'scheme', reverse: false, scheme: 'Blues', steps: 64 },
        legend: { show: true },
        tooltip: { mode: 'single', yHistogram: false },
        yAxis: { axisPlacement: 'left', unit: 's' },
      }
    ),

  // `columns`: [[field, title, unit]]. A field is a label, or "Value #A" … for a query. Other fields are not shown.
  details(title, description, queries, columns, links={})::
    panel(
      'table', title, description, 'short', queries, {
        cellHeight: 'sm',
        showHeader: true,
      }, { custom: { align: 'auto', cellOptions: { type: 'auto' }, filterable: true, inspect: false } },
      [
        {
          matcher: { id: 'byName', options: column[1] },
          properties: [{ id: 'unit', value: column[2] }]
                      + (if std.objectHas(links, column[0]) then [{ id: 'links', value: [links[column[0]]] }] else []),
        }
        for column in columns
      ]
    ) {
      width:: 24,
      transformations: [
        { id: 'merge', options: {} },
        { id: 'filterFieldsByName', options: { include: { names: [column[0] for column in columns] } } },
        {
          id: 'organize',
          options: {
            excludeByName: {},
            indexByName: { [columns[index][0]]: index for index in std.range(0, std.length(columns) - 1) },
            renameByName: { [column[0]]: column[1] for column in columns },
          },
        },
      ],
    },

  section(title, panels):: { title: title, panels: panels },

  variable(name, label, query, all=false):: {
    type: 'query',
    name: name,
    label: label,
    datasource: datasource,
    query: { query: query, refId: 'PrometheusVariableQueryEditor-VariableQuery' },
    refresh: 2,
    sort: 3,
    multi: all,
    includeAll: all,
    [if all then 'allValue']: '.*',
    [if all then 'current']: { selected: true, text: ['All'], value: ['$__all'] },
  },

  local source = {
    type: 'datasource',
    name: 'datasource',
    label: 'Data source · 数据源',
    query: 'prometheus',
    refresh: 1,
    multi: false,
    includeAll: false,
  },

  // Places the panels one after another. `at` holds x, y and the height of the current line.
  local layout(sections) = std.foldl(
    function(at, panel)
      local wraps = at.x + panel.width > 24 || panel.type == 'row';
      local x = if wraps then 0 else at.x;
      local y = if wraps then at.y + at.height else at.y;
      {
        x: x + panel.width,
        y: y,
        height: if wraps then panel.height else std.max(at.height, panel.height),
        panels: at.panels + [
          panel {
            id: std.length(at.panels) + 1,
            gridPos: { x: x, y: y, w: panel.width, h: panel.height },
          },
        ],
      },
    std.flattenArrays([
      [{ type: 'row', title: section.title, collapsed: false, panels: [], width:: 24, height:: 1 }] + section.panels
      for section in sections
    ]),
    { x: 0, y: 0, height: 0, panels: [] }
  ).panels,

  dashboard(uid, title, description, variables, sections):: {
    uid: uid,
    title: 'BlueKing / ' + title,
    description: description,
    tags: ['blueking'],
    schemaVersion: 39,
    editable: true,
    graphTooltip: 1,
    time: { from: 'now-6h', to: 'now' },
    refresh: '30s',
    timezone: 'browser',
    templating: {
      list: [
        source,
        $.variable('job', 'Job', 'label_values(blueking_exporter_build_info, job)'),
        $.variable('instance', 'Instance · 实例', 'label_values(blueking_exporter_build_info{job="$job"}, instance)', all=true),
      ] + variables,
    },
    annotations: { list: [] },
    links: [
      {
        type: 'dashboards',
        title: 'BlueKing',
        tags: ['blueking'],
        icon: 'external link',
        tooltip: '',
        asDropdown: false,
        includeVars: true,
        keepTime: true,
        targetBlank: false,
      },
    ],
    panels: layout(sections),
  },

  // A link from a row of a table to the dashboard of its business.
  toBusiness:: {
    title: 'Open this business · 打开该业务',
    url: '/d/blueking-business?var-datasource=${datasource}&var-job=${job}'
         + '&var-bk_scope_type=${__data.fields.bk_scope_type}&var-bk_scope_id=${__data.fields.bk_scope_id}'
         + '&${__url_time_range}',
  },
}
