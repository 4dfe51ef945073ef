// The form of an alert, and the phrases that several share.
{
  // The series of a counter that grew within the last hour. A series that was not there an hour ago, nor in the two hours
  // before (a scrape may have failed then), counts with its whole value: process-wide counters are not born at zero.
  // `ignoring` names labels that may change meanwhile.
  grew(counter, window, ignoring=''):: |||
    increase(%(counter)s[%(window)s]) > 0
    or
    (%(counter)s > 0 unless ignoring (%(ignoring)s) max_over_time(%(counter)s[2h] offset %(window)s))
  ||| % { counter: counter, window: window, ignoring: ignoring },

  // Unless the collector fails everywhere: then BlueKingPlatformUnreachable says it once.
  unlessEverywhere:: |||
    unless ignoring (bk_scope_type, bk_scope_id) collector:blueking_exporter_unreachable
  |||,

  // "biz 2 (Demo business)": the name stands in the configuration only, so a page looks it up.
  scope:: '{{ $labels.bk_scope_type }} {{ $labels.bk_scope_id }}'
          + '{{ with printf "blueking_scope_info{job=%q,instance=%q,bk_scope_type=%q,bk_scope_id=%q}"'
          + ' $labels.job $labels.instance $labels.bk_scope_type $labels.bk_scope_id | query }}'
          + '{{ with . | first | label "name" }} ({{ . }}){{ end }}{{ end }}',

  // increase() extrapolates: three events may be 3.05.
  rounded:: '{{ printf "%.0f" $value }}',

  // The platform's own words for a host status code.
  codeText:: '{{ with printf "blueking_job_status_code_info{job=%q,instance=%q,code=%q}"'
             + ' $labels.job $labels.instance $labels.code | query }}{{ . | first | label "text_zh" }}{{ end }}',

  // `texts`: { en: [summary, description], zh: [summary, description] }.
  alert(config, name, component, severity, expr, texts, duration='0s'):: {
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
    },
  },
}
