"""The web server: what others see over HTTP.

server       listeners, the path of one request, start and stop
connection   one connection: limits on its time and memory
security     the web configuration file in use: TLS, users, headers, rate limit
reply        an answer as a value
api          answers for programs: /metrics, health checks, reload, JSON
pages        answers for people: the landing page
"""
