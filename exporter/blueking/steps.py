"""The sub-steps of NodeMan: which step code an answer means, whatever language and engine it comes from.

Source: bk-nodeman v2.4.7, apps/backend/components/collections (agent_new, plugin), apps/backend/plugin/manager.py and
locale/en. A display text can carry a process name, a cloud area or an address; none of it ever gets out of here.
"""

from __future__ import annotations

import functools
import re

OTHER = "other"
"""A step that is not in the table, or none that failed."""

_COMMON = """
query_password | 查询主机密码 | Query host password
choose_access_point | 选择接入点 | Select access point
register_host_to_cmdb | 注册主机到配置平台 | Register host to configuration platform
install | 安装 | Install
install_plugins | 安装预设插件 | Install preset plugin
configure_policy | 配置策略 | Configure policy
reload_agent_config | 重载Agent配置 | Reload Agent Configuration
update_process_status | 更新主机进程状态 | Update host process status
update_process_status | 更新任务状态 |
agent_check_agent_status | 检查Agent状态 | Check Agent Status
push_upgrade_package | 下发升级包 | Transfer upgrade package
check_policy_gse_to_proxy | 检测 GSE Server 到 Proxy 策略 | Detecting GSE Server to Proxy Policy
run_upgrade_command | 下发升级脚本命令 | Send upgrade script command
render_and_push_gse_config | 渲染并下发Agent配置 | Render and deliver Agent configuration
wait | 等待 | Wait
agent_execute_script | 执行脚本 | Execute script
agent_transfer_file | 分发文件 | Distribution file
agent_push_config | 分发配置 | Distribution configuration
push_files_to_proxy | 下发文件到Proxy | Transfer file to Proxy
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
transfer_package | 下发安装包 | Transfer installation package
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
remove_config | 移除配置 | Remove configuration
"""

_AGENT = """
get_agent_status | 查询Agent状态 | Query Agent Status
restart | 重启 | Restart
"""

_PLUGIN = """
check_agent_status | 查询Agent状态 | Query Agent Status
gse_operate_proc | 重启 | Restart
"""


def _names(table: str) -> dict[str, str]:
    rows = [[part.strip() for part in line.split("|")] for line in table.strip().splitlines()]
    return {_key(name): code for code, *names in rows for name in names if name}


def _key(name: str) -> str:
    return "".join(name.split()).lower()


_OF_AGENT = _names(_COMMON) | _names(_AGENT)
_OF_PLUGIN = _names(_COMMON) | _names(_PLUGIN)
_CODES = frozenset(_OF_AGENT.values()) | frozenset(_OF_PLUGIN.values()) | {"update_host_process_status"}

_PASSES = re.compile(r"[a-z0-9_]{1,64}", re.ASCII)
_OPERATION = re.compile(
    r"操作进程|(取消托管|托管|启动|停止|重启|重载)(?=$|\s.*进程)"
    r"|(start|stop|restart|reload|delegate|undelegate|operate)(?=$|\s.*process)",
    re.IGNORECASE,
)
_STATE_OF_PLUGIN = "更新插件部署状态"
_BRACKETS = re.compile(r"[(（][^()（）]*[)）]\s*$")


@functools.lru_cache(maxsize=4096)
def step_slug(step_code: str | None, name: str | None, *, plugin: bool) -> str:
    """The value of the label `step`: `step_code` if it can be one, else what the display name means, else `other`.

    `plugin`: the step belongs to a plugin job; it decides where a name fits a step of agents and one of plugins.
    NodeMan 1.x puts the operation in brackets behind the name; it does not count.
    """
    if step_code and (step_code in _CODES or _PASSES.fullmatch(step_code)):
        return step_code
    text = _BRACKETS.sub("", name or "").strip()
    if code := (_OF_PLUGIN if plugin else _OF_AGENT).get(_key(text)):
        return code
    if text.startswith(_STATE_OF_PLUGIN):
        return "update_host_process_status"
    if _OPERATION.match(text):
        return "gse_operate_proc"
    return OTHER
