// How an alert is built, and texts that several alerts share.
{
  // The series of a counter that increased within `window`. A series that did not exist in the two hours before `window`
  // counts with its whole value, because the counters of a process do not start at 0. Two hours, because scrapes may have
  // failed. `ignoring`: labels that may change meanwhile.
  grew(counter, window, ignoring=''):: |||
    increase(%(counter)s[%(window)s]) > 0
    or
    (%(counter)s > 0 unless ignoring (%(ignoring)s) max_over_time(%(counter)s[2h] offset %(window)s))
  ||| % { counter: counter, window: window, ignoring: ignoring },

  // Not if the collector fails in all scopes: then BlueKingPlatformUnreachable fires once.
  unlessEverywhere:: |||
    unless ignoring (bk_scope_type, bk_scope_id) collector:blueking_exporter_unreachable
  |||,

  // "biz 2 (Demo business)". The name is in the configuration only, so the alert queries it.
  scope:: '{{ $labels.bk_scope_type }} {{ $labels.bk_scope_id }}'
          + '{{ with printf "blueking_scope_info{job=%q,instance=%q,bk_scope_type=%q,bk_scope_id=%q}"'
          + ' $labels.job $labels.instance $labels.bk_scope_type $labels.bk_scope_id | query }}'
          + '{{ with . | first | label "name" }} ({{ . }}){{ end }}{{ end }}',

  // increase() extrapolates: three events may be 3.05.
  rounded:: '{{ printf "%.0f" $value }}',

  // The platform's text for a host status code.
  codeText:: '{{ with printf "blueking_job_status_code_info{job=%q,instance=%q,code=%q}"'
             + ' $labels.job $labels.instance $labels.code | query }}{{ . | first | label "text_zh" }}{{ end }}',

  // The address of the exporter's page of failures, for the scope of the alert and the parameters in `filter`.
  failures(config, filter, language)::
    config.exporterUrl + '/failures?bk_scope_type={{ $labels.bk_scope_type }}&bk_scope_id={{ $labels.bk_scope_id }}'
    + std.join('', ['&%s=%s' % [name, filter[name]] for name in std.objectFields(filter)]) + '&lang=' + language,

  // `texts`: { en: [summary, description], zh: [summary, description] }. `failures`: the parameters of a link to the page
  // of failures; null: no link.
  alert(config, name, component, severity, expr, texts, duration='0s', failures=null):: {
    alert: name,
    expr: expr,
    [if duration != '0s' then 'for']: duration,
    labels: { severity: severity, component: component },
    annotations: {
      summary: texts.en[0],
      description: texts.en[1],
      runbook_url: '%s/en/runbooks/%s.md' % [config.docsUrl, name],
      summary_zh: texts.zh[0],
      description_zh: texts.zh[1],
      runbook_url_zh: '%s/zh/runbooks/%s.md' % [config.docsUrl, name],
    } + if failures == null then {} else {
      failures_url: $.failures(config, failures, 'en'),
      failures_url_zh: $.failures(config, failures, 'zh'),
    },
  },
}
