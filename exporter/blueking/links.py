"""Addresses of BlueKing's own pages, for people.

`web_url` is the address of a web front end with its path and without a final slash. It cannot be derived from the
address of the API. Sources: the routes of bk-job (src/frontend/src/main.js), bk-nodeman
(frontend/src/router/modules/task-history-new.ts).
"""

from __future__ import annotations

from urllib.parse import quote


def job_execution(web_url: str, job_instance_id: int | str) -> str:
    """The page of one JOB execution, whatever its kind and scope; "" without a `web_url`."""
    return f"{web_url}/api_execute/{job_instance_id}" if web_url else ""


def nodeman_job(web_url: str, job_id: int | str) -> str:
    """The page of one NodeMan 2.x job; "" without a `web_url`."""
    return f"{web_url}/#/task-list/detail/{job_id}" if web_url else ""


def nodemgr_workflow(web_url: str, domain: str, workflow_id: str) -> str:
    """The page of one NodeMan V3 workflow of a domain, node or plugin; "" without a `web_url`."""
    if not web_url:
        return ""
    active = "?active=plugin" if domain == "plugin" else ""
    return f"{web_url}/#/node-manager/history/detail/{quote(workflow_id, safe='')}{active}"
