"""The web server: everything that the exporter serves over HTTP.

server       listeners, the path of one request, start and stop
connection   one connection: limits on its time and memory
security     who may ask: the web configuration file in use, what browsers may do
reply        an answer as a value
api          answers for programs: /metrics, health checks, reload, JSON
pages        answers for people: the landing page and the failures
query        the parameters of a request
"""
