"""The sub-steps of NodeMan: every display name that NodeMan 2.4.7 gives, in Chinese and in English."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.blueking.steps import step_slug

NAMES = """
query_password | 查询主机密码 | Query host password
choose_access_point | 选择接入点 | Select access point
register_host_to_cmdb | 注册主机到配置平台 | Register host to configuration platform
install | 安装 | Install
install | 卸载Agent | Uninstall Agent
install | 卸载Proxy | Uninstall Proxy
install_plugins | 安装预设插件 | Install preset plugin
configure_policy | 配置策略 | Configure policy
get_agent_status | 查询Agent状态 | Query Agent Status | agent
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
push_files_to_proxy | 下发安装包 | Transfer installation package | agent
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
check_agent_status | 查询Agent状态 | Query Agent Status | plugin
update_host_process_status | 更新插件部署状态为RUNNING | Update plugin deployment status is RUNNING
transfer_package | 下发安装包 | Transfer installation package | plugin
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
"""Step code, Chinese name, English name; the kind of job where one name has two codes."""


def _cases() -> list[tuple[str, str, bool]]:
    cases = []
    for line in NAMES.strip().splitlines():
        code, chinese, english, *kind = (part.strip() for part in line.split("|"))
        kinds = [kind[0] == "plugin"] if kind else [False, True]
        cases += [(name, code, plugin) for name in (chinese, english) for plugin in kinds]
    return cases


@pytest.mark.parametrize(("name", "code", "plugin"), _cases())
def test_each_display_name_gives_its_step(name: str, code: str, plugin: bool) -> None:
    """The names of a live NodeMan 2.4.7; the kind of the job decides where a name has two codes."""
    assert step_slug(None, name, plugin=plugin) == code


def test_the_table_has_every_name_once() -> None:
    """59 names in each language, two of which have a code for either kind of job."""
    lines = [[part.strip() for part in line.split("|")] for line in NAMES.strip().splitlines()]
    assert len(lines) == 61
    for language in (1, 2):
        assert len({line[language] for line in lines}) == 59


@pytest.mark.parametrize(
    ("code", "name", "plugin", "slug"),
    [
        ("install", "whatever", False, "install"),
        ("DEBUG_PROCESS", None, True, "DEBUG_PROCESS"),
        ("register_host", "注册主机到配置平台", False, "register_host"),
        ("Bad Code", "安装", False, "other"),
        ("x" * 65, None, False, "other"),
        (None, "托管 processbeat 插件进程", False, "gse_operate_proc"),
        (None, "取消托管 basereport 插件进程", True, "gse_operate_proc"),
        (None, "操作进程(启动)", True, "gse_operate_proc"),
        (None, "更新任务状态", False, "other"),
        (None, "更新插件部署状态为 RUNNING", True, "update_host_process_status"),
        (None, "更新插件部署状态为TERMINATED", True, "update_host_process_status"),
        (None, "Update plugin deployment status is REMOVED", True, "update_host_process_status"),
        (None, "任务执行失败(安装)", False, "other"),
        (None, "[INSTALL_AGENT] 安装 0:127.0.0.1", False, "other"),
        (None, "停止使用 10.0.0.1", True, "other"),
        (None, "", False, "other"),
        (None, None, True, "other"),
    ],
)
def test_trap29_step_slugs(code: str | None, name: str | None, plugin: bool, slug: str) -> None:
    """Trap 29, 4.3: a code passes if it can, where there is none a name of the table counts; all else is `other`."""
    assert step_slug(code, name, plugin=plugin) == slug


@given(st.one_of(st.none(), st.text()), st.one_of(st.none(), st.text()), st.booleans())
def test_a_step_slug_is_always_a_safe_word(code: str | None, name: str | None, plugin: bool) -> None:
    """Whatever the platform sends, no localized text and no address gets into the label."""
    slug = step_slug(code, name, plugin=plugin)
    assert slug.isascii()
    assert slug.replace("_", "").isalnum() or set(slug) == {"_"}
    assert len(slug) <= 64
