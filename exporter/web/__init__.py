"""What others see over HTTP: /metrics, the landing page, the JSON API and the probes.

server       listeners, the way of one request, start and stop
connection   one connection: what it may cost, in time and memory
reply        an answer as a value
metrics      GET /metrics
landing      GET / (and landing.css)
api          /-/healthy, /-/ready, /-/reload, /api/v1/...
status       what the landing page and the API show
config       the web configuration in force, followed while running (the file is read in exporter/config/web.py)
tls          its TLS section as an ssl context
auth         its users: basic authentication
limiter      its rate limit
"""
