"""The sub-steps of NodeMan: the step code of a sub-step, in either language and from any engine.

Source: bk-nodeman v2.4.7, apps/backend/components/collections (agent_new, plugin), apps/backend/plugin/manager.py and
locale/en. A display name can contain a process name, a cloud area or an address, so it is never a label itself.
"""

from __future__ import annotations

import functools
import re

from exporter.log import redact

OTHER = "other"
"""The step is not in the table, or no step is known to have failed."""

_COMMON = """
query_password | 查询主机密码 | Query host password
choose_access_point | 选择接入点 | Select access point
register_host_to_cmdb | 注册主机到配置平台 | Register host to configuration platform
install | 安装 | Install
install | 卸载Agent | Uninstall Agent
install | 卸载Proxy | Uninstall Proxy
install_plugins | 安装预设插件 | Install preset plugin
configure_policy | 配置策略 | Configure policy
get_agent_status | 查询Proxy状态 | Query Proxy Status
reload_agent_config | 重载Agent配置 | Reload Agent Configuration
restart | 重启 | Restart
update_process_status | 更新主机进程状态 | Update host process status
agent_check_agent_status | 检查Agent状态 | Check Agent Status
push_upgrade_package | 下发升级包 | Transfer upgrade package
check_policy_gse_to_proxy | 检测 GSE Server 到 Proxy 策略 | Detecting GSE Server to Proxy Policy
run_upgrade_command | 下发升级脚本命令 | Send upgrade script command
render_and_push_gse_config | 渲染并下发Agent配置 | Render and deliver Agent configuration
wait | 等待 | Wait
agent_execute_script | 执行脚本 | Execute script
agent_execute_script | 启动 NGINX 服务 | Start NGINX service
agent_transfer_file | 分发文件 | Distribution file
agent_push_config | 分发配置 | Distribution configuration
push_files_to_proxy | 下发文件到Proxy | Transfer file to Proxy
push_files_to_proxy | 下发安装工具 | Transfer installation tool
push_files_to_proxy | 检测 BT 分发策略（下发Py36包） | Detect BT distribution strategy (distribute Py36 package)
update_install_info | 更新安装信息 | Update installation info
bind_host_agent | 绑定主机 Agent 信息 | Bind host Agent information
unbind_host_agent | 主机解绑 Agent 信息 | Unbind host Agent information
add_or_update_hosts | 新增或更新主机信息 | Add or Update host information
upgrade_to_agent_id | 升级为 Agent-ID 配置 | Upgrade to Agent-ID configured
push_host_identifier | 推送主机身份信息 | Push host identify information
push_agent_pkg_to_proxy | 下发 Agent 安装包到 Proxy | Send Agent installation package to Proxy
check_agent_ability | 检查Agent功能 | Check Agent ability
push_environ_files | 推送环境变量文件 | Push environment file
install_other_agent | 安装额外Agent | Install additional agent
init_process_status | 初始化进程状态 | Initializing process state
transfer_script | 下发脚本 | Transfer script
init_proc_script | 初始化操作脚本 | Initialize proc operate script
install_package | 安装插件包 | Install plugin package
uninstall_package | 卸载插件包 | Uninstall plugin package
reset_retry_times | 重置重试次数 | Reset retries
job_allocate_port | 分配可用端口 | Allocate available ports
delete_subscription | 删除策略 | Delete policy
switch_subscription_enable | 切换订阅启用状态 | Toggle subscription enabled state
render_and_push_config | 渲染下发配置 | Rendering config
DEBUG_PROCESS | 调试插件 | Debug plugin
STOP_DEBUG_PROCESS | 停止调试插件 | Stop debugging plugin
gse_operate_proc | 启动进程 | Start process
gse_operate_proc | 停止进程 | Stop process
gse_operate_proc | 查询进程 | Query process
gse_operate_proc | 托管进程 | Supervised process
gse_operate_proc | 取消托管进程 | Cancel supervised process
gse_operate_proc | 重启进程 | Restart process
gse_operate_proc | 重载进程 | Reload process
gse_operate_proc | 操作进程 | Operation process
remove_config | 移除配置 | Remove configuration
"""

_AGENT = """
get_agent_status | 查询Agent状态 | Query Agent Status
push_files_to_proxy | 下发安装包 | Transfer installation package
"""

_PLUGIN = """
check_agent_status | 查询Agent状态 | Query Agent Status
transfer_package | 下发安装包 | Transfer installation package
"""


def _names(table: str) -> dict[str, str]:
    rows = [[part.strip() for part in line.split("|")] for line in table.strip().splitlines()]
    return {_key(name): code for code, *names in rows for name in names}


def _first_names(table: str) -> dict[str, tuple[str, str]]:
    rows = [[part.strip() for part in line.split("|")] for line in table.strip().splitlines()]
    return {code: (english, chinese) for code, chinese, english in reversed(rows)}


def _key(name: str) -> str:
    return "".join(name.split()).lower()


STEP_NAMES = _first_names(_PLUGIN) | _first_names(_AGENT) | _first_names(_COMMON)
"""Step code → its name for people, in English and Chinese; a code with several names has the first."""

_OF_AGENT = _names(_COMMON) | _names(_AGENT)
_OF_PLUGIN = _names(_COMMON) | _names(_PLUGIN)
_CODES = frozenset(_OF_AGENT.values()) | frozenset(_OF_PLUGIN.values()) | {"update_host_process_status"}

_PASSES = re.compile(r"[a-z0-9_]{1,64}", re.ASCII)
_STATUS_OF_PLUGIN = ("更新插件部署状态为", "updateplugindeploymentstatusis")
"""Keys of the names whose last word is a status word."""
_OPERATION = re.compile(r"(取消托管|托管|启动|停止|重启|重载)\s.*进程")
"""How older engines name an operation on the process of a plugin."""
_BRACKETS = re.compile(r"[(（][^()（）]*[)）]\s*$")


@functools.lru_cache(maxsize=4096)
def step_slug(step_code: str | None, name: str | None, *, plugin: bool) -> str:
    """The value of the label `step`: a `step_code`, where there is none what the display name means, else `other`.

    `plugin`: the step belongs to a plugin job. This decides between two codes with the same name.
    NodeMan 1.x writes the operation in brackets behind the name.
    """
    if step_code:
        return step_code if step_code in _CODES or _PASSES.fullmatch(redact(step_code)) else OTHER
    text = (name or "").strip()
    without_operation = _BRACKETS.sub("", text)
    codes = _OF_PLUGIN if plugin else _OF_AGENT
    for key in (_key(text), _key(without_operation)):
        if code := codes.get(key):
            return code
        if key.startswith(_STATUS_OF_PLUGIN):
            return "update_host_process_status"
    return "gse_operate_proc" if _OPERATION.match(text) else OTHER
