//! Every knob with the test that sees it take effect, and the tests of those that no other file is about.

use std::path::Path;
use std::time::Duration;

use exec_gateway::config::{Config, KNOBS, Secret};
use serde_json::json;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::flavours::{Executor, Flavour};
use crate::support::harness::dial;
use crate::support::{
    Caller, FakeExecutor, MIB, Scratch, TestGateway, Upstream, Verdict, Workbench, eventually, noise,
};

/// The knob, the file of the test, the test.
const SEEN: &[(&str, &str, &str)] = &[
    ("listen", "tests/cli.rs", "the_ready_line_is_plain_text_at_any_level_and_format_and_term_exits_0"),
    ("ops_listen", "tests/cli.rs", "the_ready_line_is_plain_text_at_any_level_and_format_and_term_exits_0"),
    ("state_dir", "tests/cli.rs", "a_second_daemon_on_one_state_directory_ends_with_one_line"),
    ("public_url", "tests/registration.rs", "the_configured_url_wins_over_the_host"),
    ("log_level", "tests/cli.rs", "the_ready_line_is_plain_text_at_any_level_and_format_and_term_exits_0"),
    ("log_format", "tests/cli.rs", "the_ready_line_is_plain_text_at_any_level_and_format_and_term_exits_0"),
    ("otlp_endpoint", "tests/trace.rs", "the_spans_of_a_call_hang_below_the_callers_and_the_executors_below_them"),
    ("edge.connections_max", "tests/limits.rs", "connections_past_the_bound_wait_until_another_ends"),
    ("edge.header_timeout_secs", "tests/limits.rs", "a_client_that_never_ends_its_headers_is_cut_off"),
    ("edge.idle_timeout_secs", "tests/limits.rs", "a_connection_without_a_further_request_is_closed"),
    ("edge.body_timeout_secs", "tests/limits.rs", "a_client_that_never_ends_its_body_is_told_so"),
    ("edge.tcp_user_timeout_secs", "src/edge/listener.rs", "a_peer_that_takes_nothing_is_cut_by_the_kernel"),
    ("edge.write_timeout_secs", "tests/attach.rs", "an_answer_that_is_not_taken_loses_its_connection"),
    ("edge.header_bytes_max", "tests/limits.rs", "headers_past_the_bound_are_refused"),
    ("edge.body_bytes_max", "tests/rest.rs", "a_body_past_the_bound_is_refused_whether_it_is_announced_or_not"),
    ("edge.trusted_proxies", "tests/tls.rs", "a_trusted_proxy_says_how_the_executor_came_and_nobody_else_does"),
    ("tls.certificate", "tests/tls.rs", "the_api_is_served_over_tls_and_executors_are_sent_there"),
    ("tls.key", "tests/tls.rs", "the_api_is_served_over_tls_and_executors_are_sent_there"),
    (
        "tls.executor_authorities",
        "tests/tls.rs",
        "executors_show_a_certificate_where_it_is_asked_for_and_callers_need_none",
    ),
    ("tls.ops_certificate", "tests/tls.rs", "operators_are_served_over_tls_to_whoever_shows_a_certificate"),
    ("tls.ops_key", "tests/tls.rs", "operators_are_served_over_tls_to_whoever_shows_a_certificate"),
    ("tls.ops_authorities", "tests/tls.rs", "operators_are_served_over_tls_to_whoever_shows_a_certificate"),
    ("auth.upstream_url", "tests/reload.rs", "the_upstream_is_asked_where_it_is_and_with_the_secret_it_has_now"),
    (
        "auth.upstream_authorities",
        "tests/tls.rs",
        "the_validator_is_asked_over_tls_and_believed_only_with_a_known_certificate",
    ),
    ("auth.upstream_secret", "tests/reload.rs", "the_upstream_is_asked_where_it_is_and_with_the_secret_it_has_now"),
    ("auth.upstream_secret_file", "tests/knobs.rs", "secrets_are_read_from_the_files_that_are_named"),
    ("auth.shared_secret", "tests/reload.rs", "a_secret_that_was_replaced_is_good_until_the_reload_after"),
    ("auth.shared_secret_file", "tests/knobs.rs", "secrets_are_read_from_the_files_that_are_named"),
    (
        "auth.internal_secret",
        "tests/compat.rs",
        "a_door_without_its_secret_does_not_exist_and_one_with_it_opens_to_nothing_else",
    ),
    ("auth.internal_secret_file", "tests/knobs.rs", "secrets_are_read_from_the_files_that_are_named"),
    (
        "auth.upstream_timeout_secs",
        "tests/tokens.rs",
        "a_validator_that_fails_in_any_way_is_no_refusal_and_is_not_remembered",
    ),
    ("auth.positive_ttl_secs", "tests/tokens.rs", "a_good_token_is_asked_for_again_after_its_time"),
    ("auth.negative_ttl_secs", "tests/tokens.rs", "a_refused_token_gets_another_chance_after_its_time"),
    ("auth.stale_secs", "tests/knobs.rs", "a_good_token_is_believed_for_so_long_while_the_upstream_fails"),
    ("auth.positive_entries_max", "tests/tokens.rs", "junk_never_costs_a_good_token_its_place"),
    ("auth.negative_entries_max", "tests/tokens.rs", "junk_never_costs_a_good_token_its_place"),
    ("auth.upstream_requests_max", "tests/knobs.rs", "questions_to_the_upstream_past_the_bound_wait"),
    ("auth.cap_token_ttl_secs", "tests/knobs.rs", "rights_that_the_gateway_gives_end_after_their_time"),
    ("auth.ticket_ttl_secs", "tests/knobs.rs", "rights_that_the_gateway_gives_end_after_their_time"),
    ("auth.harness_ttl_secs", "tests/knobs.rs", "rights_that_the_gateway_gives_end_after_their_time"),
    ("auth.revocations_max", "src/auth/cap_token.rs", "a_revocation_that_cannot_be_stored_does_not_count"),
    ("link.links_max", "tests/limits.rs", "executors_past_the_bound_are_told_to_come_again"),
    ("link.ping_secs", "tests/links.rs", "an_executor_that_answers_no_ping_for_too_long_is_gone"),
    ("link.dead_secs", "tests/links.rs", "an_executor_that_answers_no_ping_for_too_long_is_gone"),
    (
        "link.write_timeout_secs",
        "tests/links.rs",
        "an_executor_that_never_reads_loses_its_link_and_the_others_wait_for_nothing",
    ),
    ("link.handshake_timeout_secs", "tests/links.rs", "a_handshake_that_is_never_completed_fails_its_call_alone"),
    (
        "link.answer_timeout_secs",
        "tests/links.rs",
        "a_request_that_is_never_answered_times_out_and_leaves_open_whether_it_ran",
    ),
    ("link.takeover_ping_secs", "tests/links.rs", "a_process_that_is_silent_gives_its_place_to_another_one"),
    (
        "link.register_hold_secs",
        "tests/flavours.rs",
        "while_a_direct_executor_answers_another_process_is_held_and_then_refused",
    ),
    ("link.executor_wait_secs", "tests/links.rs", "a_link_lost_before_the_request_was_sent_ran_nothing"),
    ("link.executor_seen_secs", "tests/knobs.rs", "an_executor_that_was_not_seen_lately_is_not_waited_for"),
    ("link.harness_wait_secs", "tests/knobs.rs", "harnesses_wait_for_an_executor_for_a_time_of_their_own"),
    ("link.first_frame_secs", "tests/bridge_faults.rs", "first_words_that_make_no_harness_end_the_socket"),
    ("link.streams_max", "tests/limits.rs", "streams_past_the_bound_of_a_link_are_refused"),
    ("link.workspace_streams_max", "tests/limits.rs", "streams_past_the_share_of_a_workspace_leave_room_for_another"),
    ("link.handshakes_pending_max", "tests/limits.rs", "handshakes_past_the_bound_of_a_link_wait_their_turn"),
    (
        "link.requests_in_flight_max",
        "src/relay/shared_tests.rs",
        "requests_take_turns_by_workspace_and_are_bounded_on_the_socket",
    ),
    (
        "link.outbox_frames_max",
        "src/relay/link.rs",
        "who_floods_a_link_lets_a_neighbour_pass_within_an_outbox_and_a_batch",
    ),
    ("link.stream_bytes_max", "src/relay/link.rs", "an_inbox_has_room_for_its_bytes_in_frames_of_the_largest_size"),
    (
        "link.spill_memory_bytes_max",
        "src/relay/spill.rs",
        "whatever_is_pushed_and_popped_comes_in_order_and_within_the_bounds",
    ),
    ("link.spill_bytes_max", "tests/harness.rs", "a_harness_that_never_reads_is_left_behind_alone"),
    (
        "link.comeback_wait_secs",
        "tests/bridge_faults.rs",
        "a_harness_that_does_not_come_back_in_time_is_told_that_its_stream_has_ended",
    ),
    (
        "link.comeback_bytes_max",
        "tests/bridge_faults.rs",
        "a_harness_that_lacks_more_than_is_kept_is_told_that_its_stream_has_ended",
    ),
    ("link.frame_bytes_max", "tests/bridge_faults.rs", "a_message_that_is_too_large_ends_its_harness_alone"),
    ("link.message_bytes_max", "tests/bridge_faults.rs", "a_message_that_is_too_large_ends_its_harness_alone"),
    ("link.json_frame_bytes_max", "tests/knobs.rs", "a_frame_without_relay_frames_has_a_bound"),
    (
        "link.adopt_secs",
        "tests/flavours.rs",
        "silent_processes_that_nobody_takes_up_after_a_gateway_was_killed_are_ended",
    ),
    ("link.sessions_max", "src/relay/shared_tests.rs", "sessions_outlive_the_socket_and_their_bound_is_kept"),
    ("link.read_buffer_bytes", "src/edge/upgrade.rs", "a_socket_has_the_sizes_that_were_given"),
    (
        "link.registrations_max",
        "src/store/embedded_tests.rs",
        "only_the_newest_registrations_of_each_executor_are_kept",
    ),
    ("workspace.calls_max", "tests/mcp.rs", "a_workspace_that_has_no_place_for_a_call_can_still_cancel_one"),
    (
        "workspace.calls_per_second_max",
        "tests/limits.rs",
        "who_asks_too_often_is_told_when_to_come_again_and_executors_never_are",
    ),
    (
        "workspace.calls_burst_max",
        "tests/limits.rs",
        "who_asks_too_often_is_told_when_to_come_again_and_executors_never_are",
    ),
    ("workspace.idle_secs", "tests/tenancy.rs", "an_idle_workspace_is_dropped_and_built_again_while_a_busy_one_stays"),
    ("workspace.entries_max", "tests/knobs.rs", "workspaces_past_the_bound_let_the_least_lately_used_one_go"),
    (
        "workspace.resolver_ttl_secs",
        "src/workspace/resolver.rs",
        "names_are_asked_for_once_in_a_while_and_forgotten_ones_never_come_back",
    ),
    ("memory.high_percent", "src/ops/memory.rs", "the_fullest_bound_counts_and_the_watermark_has_a_lower_edge"),
    ("memory.low_percent", "src/ops/memory.rs", "the_fullest_bound_counts_and_the_watermark_has_a_lower_edge"),
    ("memory.limit_bytes", "tests/memory.rs", "past_the_watermark_new_work_is_refused_and_what_runs_is_served"),
    (
        "memory.bodies_bytes_max",
        "tests/memory.rs",
        "a_flood_of_large_calls_is_shed_and_the_process_and_its_sessions_live",
    ),
    ("tools.timeout_secs", "tests/knobs.rs", "bounds_of_calls_and_pages_follow_a_reload"),
    ("tools.timeout_max_secs", "tests/knobs.rs", "bounds_of_calls_and_pages_follow_a_reload"),
    (
        "tools.relink_wait_secs",
        "tests/restart.rs",
        "a_call_whose_executor_dies_ends_when_its_wait_is_over_and_the_next_one_works",
    ),
    ("tools.output_bytes_max", "tests/shell.rs", "output_past_the_bound_of_one_answer_is_named"),
    ("tools.upload_bytes_max", "tests/files_http.rs", "a_caller_that_leaves_half_way_leaves_nothing_behind"),
    ("tools.patch_bytes_max", "tests/patch.rs", "files_larger_than_a_patch_may_hold_are_refused"),
    ("tools.keepalive_after_secs", "tests/shell.rs", "a_long_call_sends_spaces_before_its_result"),
    ("tools.keepalive_secs", "tests/shell.rs", "a_long_call_sends_spaces_before_its_result"),
    ("tools.env_exclude", "tests/knobs.rs", "bounds_of_calls_and_pages_follow_a_reload"),
    ("transfer.ticket_ttl_secs", "tests/transfer.rs", "a_side_that_is_left_alone_is_told_when_the_ticket_ends"),
    ("transfer.ticket_ttl_max_secs", "tests/transfer.rs", "a_side_that_is_left_alone_is_told_when_the_ticket_ends"),
    ("transfer.workspace_max", "tests/transfer.rs", "a_workspace_has_so_many_transfers_and_takes_none_of_another"),
    ("transfer.stall_secs", "tests/transfer.rs", "a_sender_that_sends_nothing_for_long_fails_the_transfer"),
    ("session.workspace_max", "tests/sessions.rs", "sessions_past_the_bound_are_refused_and_forgotten_ones_make_room"),
    ("session.idle_secs", "tests/endure.rs", "an_idle_session_leaves_nothing_behind_and_one_that_prints_is_not_idle"),
    (
        "session.running_idle_secs",
        "tests/endure.rs",
        "an_idle_session_leaves_nothing_behind_and_one_that_prints_is_not_idle",
    ),
    ("session.memory_bytes_max", "tests/knobs.rs", "of_a_long_output_so_much_stays_in_memory"),
    (
        "session.spill_bytes_max",
        "tests/endure.rs",
        "output_beyond_memory_and_quota_is_exact_for_who_reads_along_and_its_newest_part_afterwards",
    ),
    ("session.workspace_spill_bytes_max", "src/session/quota.rs", "one_workspace_over_its_bound_costs_another_nothing"),
    ("session.total_spill_bytes_max", "src/session/quota.rs", "the_bound_of_all_counts_what_the_workspaces_have_left"),
    ("session.disk_free_percent", "src/session/quota.rs", "a_part_of_the_disk_stays_free"),
    ("session.page_bytes", "tests/knobs.rs", "bounds_of_calls_and_pages_follow_a_reload"),
    ("session.page_bytes_max", "tests/knobs.rs", "bounds_of_calls_and_pages_follow_a_reload"),
    ("session.streams_max", "tests/attach.rs", "streams_past_the_bound_are_refused_until_one_ends"),
    ("session.wait_max_secs", "tests/sessions.rs", "a_process_that_does_not_read_can_still_be_terminated"),
    ("session.retention_secs", "tests/endure.rs", "a_session_whose_executor_stays_away_is_lost_after_the_retention"),
    ("audit.enabled", "tests/audit.rs", "nothing_is_recorded_where_the_audit_is_off"),
    (
        "audit.when_full",
        "tests/audit.rs",
        "where_the_operator_says_so_calls_go_on_over_a_full_disk_and_the_gap_is_counted",
    ),
    ("audit.contents", "tests/audit.rs", "contents_are_on_record_where_the_operator_wants_them"),
    ("audit.detail_bytes_max", "src/audit/tests.rs", "what_is_too_long_is_cut_and_told_by_size_and_hash"),
    ("audit.content_bytes_max", "src/audit/tests.rs", "contents_have_a_bound_of_their_own"),
    ("audit.file_bytes_max", "src/audit/tests.rs", "a_kill_at_any_byte_leaves_a_chain_that_goes_on"),
    ("audit.bytes_max", "src/audit/tests.rs", "the_oldest_files_go_for_the_quota_and_the_rest_still_verifies"),
    ("audit.retention_days", "src/audit/tests.rs", "files_go_when_their_time_is_over"),
    ("audit.queue_max", "src/audit/tests.rs", "many_callers_at_once_share_writes_and_each_is_on_record"),
    ("audit.open_max", "src/audit/tests.rs", "what_is_remembered_for_a_kill_is_bounded"),
    ("mcp.text_bytes_max", "tests/mcp.rs", "output_too_long_for_a_model_is_cut_and_kept_whole_in_a_session"),
    ("mcp.progress_secs", "tests/mcp.rs", "a_long_call_tells_its_progress_and_holds_up_no_other"),
    ("mcp.allowed_origins", "tests/mcp.rs", "pages_of_other_sites_may_not_call"),
    ("mcp.authorization_servers", "tests/mcp.rs", "without_a_good_token_a_client_learns_how_to_come_by_one"),
    ("drain.announce_secs", "tests/knobs.rs", "a_gateway_that_is_about_to_drain_says_so_and_goes_on_meanwhile"),
    ("drain.grace_secs", "tests/relink.rs", "a_gateway_that_stops_waits_for_no_link"),
];

#[test]
fn every_knob_has_a_test_that_sees_it_take_effect() {
    let listed: Vec<&str> = SEEN.iter().map(|(knob, ..)| *knob).collect();
    let known: Vec<&str> = KNOBS.iter().map(|knob| knob.name).collect();
    assert_eq!(listed, known, "the list has every knob, in the order of the table");
    for (knob, file, test) in SEEN {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file));
        let text = text.unwrap_or_else(|error| panic!("{knob}: {file}: {error}"));
        let here = text.find(&format!("fn {test}(")).unwrap_or_else(|| panic!("{knob}: no test {test} in {file}"));
        let before = text[..here].trim_end().trim_end_matches("async").trim_end();
        assert!(before.ends_with(']') && before.contains("test"), "{knob}: {test} is no test");
    }
}

#[test]
fn secrets_are_read_from_the_files_that_are_named() {
    let scratch = Scratch::new();
    let flags = ["upstream", "shared", "internal"].map(|name| {
        let path = scratch.path().join(name);
        std::fs::write(&path, format!("{name}-secret\n")).unwrap();
        (format!("auth.{name}_secret_file"), path.display().to_string())
    });
    let config = Config::resolve(&flags, None, std::iter::empty()).unwrap().config.auth;
    let holds = |secret: &Option<Secret>, text: &str| secret.as_ref().is_some_and(|secret| secret.is(text));
    assert!(holds(&config.upstream_secret, "upstream-secret"));
    assert!(holds(&config.shared_secret, "shared-secret"));
    assert!(holds(&config.internal_secret, "internal-secret"));
}

#[tokio::test]
async fn workspaces_past_the_bound_let_the_least_lately_used_one_go() {
    let gateway = TestGateway::with(|config| config.workspace.entries_max = 2).await;
    for workspace in ["a", "b", "c"] {
        gateway.caller(workspace).await.environments().await;
    }
    let kept = gateway.gateway.api().workspaces.all();
    let mut kept: Vec<_> = kept.iter().map(|workspace| workspace.id().as_str().to_owned()).collect();
    kept.sort();
    assert_eq!(kept, ["b", "c"]);
}

#[tokio::test]
async fn rights_that_the_gateway_gives_end_after_their_time() {
    let gateway = TestGateway::with(|config| config.auth.cap_token_ttl_secs = 600).await;
    let auth = &gateway.gateway.api().corridor.auth;
    let life = || {
        let token = auth.cap_tokens().for_workspace(&"w".parse().unwrap()).unwrap();
        let end = auth.cap_tokens().verify(token.expose()).unwrap().expires_at().unwrap();
        end.duration_since(std::time::SystemTime::now()).unwrap().as_secs()
    };
    let life = life();
    assert!((540..=600).contains(&life), "{life}");

    gateway.reload(|config| (config.auth.ticket_ttl_secs, config.auth.harness_ttl_secs) = (120, 240)).unwrap();
    let (executor, registration) = ("exe_1".parse().unwrap(), "exr_1".parse().unwrap());
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let ticket = auth.tickets().mint(&executor);
    let end: u64 = ticket.split('.').nth(1).unwrap().parse().unwrap();
    assert!((now + 110..=now + 130).contains(&end), "{end} at {now}");
    let handshake = auth.harness().mint(&"w".parse().unwrap(), &executor, &registration, &[0; 32]);
    let end = auth.handshake(&handshake, &executor).unwrap().exp;
    assert!((now + 230..=now + 250).contains(&end), "{end} at {now}");
}

async fn asked(gateway: &TestGateway, token: &str) -> u16 {
    let caller = Caller::new(gateway.address(), Some(token.into()));
    caller.post("/api/connectors/envs/list", json!({})).await.status.as_u16()
}

#[tokio::test]
async fn a_good_token_is_believed_for_so_long_while_the_upstream_fails() {
    let upstream = Upstream::start().await;
    upstream.knows_token("known", "w");
    let gateway = TestGateway::with(|config| {
        upstream.configure(config);
        (config.auth.positive_ttl_secs, config.auth.stale_secs) = (1, 2);
    })
    .await;
    assert_eq!(asked(&gateway, "known").await, 200);
    upstream.says_to_all(Some(Verdict::Say(500, json!({}))));
    eventually("the token is too old", async || (asked(&gateway, "known").await == 503).then_some(())).await;
}

#[tokio::test]
async fn questions_to_the_upstream_past_the_bound_wait() {
    let upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| {
        upstream.configure(config);
        (config.auth.upstream_requests_max, config.auth.upstream_timeout_secs) = (1, 30);
    })
    .await;
    upstream.hold();
    let both = async { tokio::join!(asked(&gateway, "one"), asked(&gateway, "other")) };
    let mut both = std::pin::pin!(both);
    assert!(timeout(Duration::from_millis(300), &mut both).await.is_err());
    assert_eq!(upstream.asked_in_all(), 1, "the other one waits");
    upstream.release();
    assert_eq!((both.await, upstream.asked_in_all()), ((401, 401), 2));
}

#[tokio::test]
async fn a_gateway_that_is_about_to_drain_says_so_and_goes_on_meanwhile() {
    let gateway = TestGateway::with(|config| (config.drain.announce_secs, config.drain.grace_secs) = (49, 1)).await;
    let (caller, ops) = (gateway.caller("w").await, Caller::new(gateway.gateway.ops(), None));
    let _running = AbortOnDropHandle::new(tokio::spawn(gateway.gateway.run_until(async {})));
    eventually("it is announced", async || (ops.send("GET", "/readyz", &[], "").await.status == 503).then_some(()))
        .await;
    assert!(caller.environments().await.is_empty(), "new calls are answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn bounds_of_calls_and_pages_follow_a_reload() {
    let bench = Workbench::start().await;
    let (caller, gateway) = (&bench.caller, &bench.gateway);
    let run = async |arguments| caller.tool("box", "shell", arguments).await;
    let output =
        json!({ "command": "for i in $(seq 12); do printf '%01000d' $i; sleep 0.05; done", "yield_time_ms": 9000 });
    let started = caller.result("box", "exec_command", output).await;
    let session = started["structuredContent"]["session_id"].as_str().unwrap().to_owned();
    gateway
        .reload(|config| {
            (config.tools.timeout_secs, config.tools.timeout_max_secs) = (1, 2);
            config.tools.env_exclude = vec!["PA*".into()];
            (config.session.page_bytes, config.session.page_bytes_max) = (1024, 2048);
        })
        .unwrap();

    let slow = run(json!({ "command": "sleep 600" })).await.json();
    assert_eq!(slow["structuredContent"]["timed_out"], true, "{slow}");
    let long = run(json!({ "command": "true", "timeout_ms": 2001 })).await;
    assert_eq!((long.status.as_u16(), long.code().as_str()), (400, "bad_arguments"));
    let kept_out = run(json!({ "command": ["/usr/bin/env"] })).await.json();
    let text = kept_out["structuredContent"]["stdout"].as_str().unwrap().to_owned();
    assert!(!text.lines().any(|line| line.starts_with("PATH=")), "{text}");

    let page = async |query: &str| {
        let path = format!("/api/connectors/processes/{session}/output?since=0{query}");
        let answer = caller.send("GET", &path, &[], "").await.json();
        let chunks = answer["chunks"].as_array().unwrap().clone();
        chunks.iter().map(|chunk| chunk["data_b64"].as_str().unwrap().len() / 4 * 3).sum::<usize>()
    };
    // Chunks are told whole, and each has about a thousand bytes.
    let (usual, most) = (page("").await, page("&max_bytes=100000").await);
    assert!((1..5000).contains(&usual), "{usual}");
    assert!((usual..7000).contains(&most), "{most} of 12000");
}

#[tokio::test]
async fn an_executor_that_was_not_seen_lately_is_not_waited_for() {
    let gateway = TestGateway::with(|config| {
        (config.link.executor_seen_secs, config.link.harness_wait_secs) = (1, 600);
    })
    .await;
    let (credentials, caller) = (gateway.executor("w", "box").await, gateway.caller("w").await);
    drop(FakeExecutor::connected(&gateway, &credentials).await);
    let path = format!("/bridge/{}", credentials.executor);
    eventually("it is refused at once", async || {
        // A harness of the first second waits.
        let refused = timeout(Duration::from_secs(5), dial(&caller, &path)).await.ok()?;
        (refused.unwrap_err().0 == 503).then_some(())
    })
    .await;
}

#[tokio::test]
async fn harnesses_wait_for_an_executor_for_a_time_of_their_own() {
    let gateway = TestGateway::with(|config| {
        (config.link.harness_wait_secs, config.link.executor_wait_secs) = (1, 4);
    })
    .await;
    let (credentials, caller) = (gateway.executor("w", "box").await, gateway.caller("w").await);
    drop(FakeExecutor::connected(&gateway, &credentials).await);
    let path = format!("/bridge/{}", credentials.executor);
    let call = async { caller.tool("box", "shell", json!({ "command": "true" })).await.status.as_u16() };
    let first = tokio::select! {
        status = call => ("call", status),
        refused = dial(&caller, &path) => ("harness", refused.unwrap_err().0),
    };
    assert_eq!(first, ("harness", 503));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_without_relay_frames_has_a_bound() {
    let gateway = TestGateway::with(|config| {
        (config.link.json_frame_bytes_max, config.tools.relink_wait_secs) = (65_536, 1);
    })
    .await;
    let (credentials, caller) = (gateway.executor("w", "box").await, gateway.caller("w").await);
    let executor = Executor::start(Flavour::Agentx, gateway.address(), &credentials).await;
    eventually("it is connected", async || (caller.environments().await == ["box"]).then_some(())).await;
    let read = async |bytes: usize| {
        let path = executor.process().home().join(bytes.to_string());
        std::fs::write(&path, noise(7, bytes)).unwrap();
        let answer = caller.tool("box", "read_file", json!({ "path": path, "encoding": "base64" })).await;
        answer.status.as_u16()
    };
    assert_eq!(read(20_000).await, 200);
    assert_eq!(read(100_000).await, 502);
    gateway.reload(|config| config.link.json_frame_bytes_max = MIB).unwrap();
    eventually("its next socket takes more", async || (read(100_000).await == 200).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_long_output_so_much_stays_in_memory() {
    let bench = Workbench::with(|config| config.session.memory_bytes_max = 64 * 1024).await;
    let ops = Caller::new(bench.gateway.gateway.ops(), None);
    let command = format!("yes | head -c {MIB}");
    let started = bench.caller.result("box", "exec_command", json!({ "command": command })).await;
    let path = format!("/api/connectors/processes/{}", started["structuredContent"]["session_id"].as_str().unwrap());
    eventually("it is over", async || {
        (bench.caller.send("GET", &path, &[], "").await.json()["state"] == "exited").then_some(())
    })
    .await;
    let page = String::from_utf8(ops.send("GET", "/metrics", &[], "").await.body.to_vec()).unwrap();
    let held = |place: &str| -> f64 {
        let series = format!("exec_gateway_session_journal_bytes{{place=\"{place}\"}} ");
        page.lines().find_map(|line| line.strip_prefix(&*series)).unwrap().parse().unwrap()
    };
    assert!(held("disk") > MIB as f64 && (1.0..=65_536.0).contains(&held("memory")), "{page}");
}
