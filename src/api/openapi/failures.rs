//! Which errors may come, by what can fail: the statuses and codes that `api::error` and the doors choose, as lists
//! that operations put together.

/// Statuses with their codes.
pub(super) type Failures = &'static [(u16, &'static str)];

/// Any request.
pub(super) const ANY: Failures = &[(500, "internal")];

/// A parameter of the path.
pub(super) const PATH: Failures = &[(404, "not_found")];

/// The credential of a caller.
pub(super) const AUTH: Failures = &[(401, "missing_bearer"), (401, "invalid_token"), (503, "auth_unavailable")];

/// The requests of a workspace in a second.
pub(super) const PACE: Failures = &[(429, "rate_limited")];

/// A credential that may only read.
pub(super) const READ_ONLY: Failures = &[(403, "forbidden")];

/// New work while the gateway stops.
pub(super) const DRAINING: Failures = &[(503, "draining")];

/// A body.
pub(super) const BODY: Failures = &[(400, "bad_request"), (408, "body_timeout"), (413, "body_too_large")];

/// Parameters of the query, and headers.
pub(super) const QUERY: Failures = &[(400, "bad_request")];

/// A place among the calls of the workspace, and memory for it.
pub(super) const PLACE: Failures = &[(429, "too_many_calls"), (503, "overloaded")];

/// The gateway's own store.
pub(super) const STORE: Failures = &[(503, "store_unavailable")];

/// The record of what is done.
pub(super) const AUDIT: Failures = &[(503, "audit_unavailable")];

/// An environment and its executor.
pub(super) const REACH: Failures = &[
    (400, "environment_required"),
    (403, "forbidden"),
    (404, "env_not_found"),
    (409, "stream_taken"),
    (429, "too_many_streams"),
    (502, "executor_unreachable"),
    (503, "executor_not_connected"),
    (503, "store_unavailable"),
    (504, "executor_timeout"),
];

/// A process session that a call names or starts.
pub(super) const SESSION: Failures = &[
    (404, "session_not_found"),
    (409, "idempotency_conflict"),
    (429, "too_many_sessions"),
    (429, "too_many_streams"),
    (502, "executor_unreachable"),
    (503, "store_unavailable"),
    (504, "executor_timeout"),
];

/// A process session in the path.
pub(super) const KNOWN_SESSION: Failures = &[(404, "session_not_found"), (503, "store_unavailable")];

/// Bytes for a process.
pub(super) const STDIN: Failures = &[
    (409, "eof_unsupported"),
    (409, "stdin_closed"),
    (409, "stdin_offset"),
    (429, "stdin_full"),
    (503, "executor_not_connected"),
];

/// The order of a tool call.
pub(super) const CALL: Failures = &[(400, "bad_arguments"), (400, "unknown_tool"), (409, "env_mismatch")];

/// A stream that stays open.
pub(super) const LIVE: Failures = &[(429, "too_many_streams")];

/// A WebSocket handshake.
pub(super) const UPGRADE: Failures = &[(426, "upgrade_required")];

/// A file over plain HTTP.
pub(super) const FILE: Failures = &[
    (400, "bad_arguments"),
    (400, "bad_request"),
    (400, "invalid"),
    (403, "no_permission"),
    (404, "file_not_found"),
    (409, "corrupt"),
    (409, "failed"),
    (409, "is_a_directory"),
    (409, "not_a_directory"),
    (409, "not_a_file"),
    (409, "not_empty"),
    (409, "symlink_loop"),
    (409, "unsupported"),
    (412, "changed"),
    (412, "exists"),
    (413, "too_large"),
    (507, "no_space"),
];

/// A part of a file.
pub(super) const RANGE: Failures = &[(416, "range_not_satisfiable")];

/// Who an executor is, at a request that is held rather than refused.
pub(super) const EXECUTOR: Failures =
    &[(401, "unauthorized"), (502, "authentication_service_unavailable"), (503, "registration_conflict")];

/// What an executor has to be to register.
pub(super) const REGISTER: Failures = &[
    (403, "certificate_required"),
    (403, "direct_transport_refused"),
    (403, "executor_not_registered"),
    (409, "registration_conflict"),
];

/// The way to an executor, as harnesses ask for it.
pub(super) const HARNESS: Failures = &[(403, "forbidden"), (503, "executor_not_connected"), (503, "store_unavailable")];

/// An executor whose link is not encrypted.
pub(super) const NOT_ENCRYPTED: Failures = &[(409, "not_encrypted")];

/// The socket of an executor.
pub(super) const LINK: Failures = &[
    (403, "certificate_required"),
    (404, "not_found"),
    (409, "conflict"),
    (409, "registration_conflict"),
    (502, "authentication_service_unavailable"),
    (503, "registration_conflict"),
    (503, "too_many_links"),
];

/// The socket of a harness.
pub(super) const HARNESS_SOCKET: Failures =
    &[(429, "too_many_handshakes"), (429, "too_many_streams"), (503, "overloaded")];

/// The secret of a service; without one in the configuration there is no such path.
pub(super) const SECRET: Failures = &[(401, "unauthorized"), (404, "not_found")];

/// An operator's command, as services give them.
pub(super) const OPERATE: Failures =
    &[(400, "bad_request"), (404, "not_found"), (409, "conflict"), (503, "store_unavailable")];

/// Turns that are remembered as ended.
pub(super) const REVOCATIONS: Failures = &[(503, "too_many_revocations")];

/// A new transfer.
pub(super) const NEW_TRANSFER: Failures =
    &[(403, "forbidden"), (429, "too_many_transfers"), (503, "overloaded"), (503, "store_unavailable")];

/// One side of a transfer.
pub(super) const TRANSFER: Failures = &[
    (401, "unauthorized"),
    (404, "transfer_not_found"),
    (408, "transfer_alone"),
    (410, "transfer_over"),
    (423, "transfer_claimed"),
    (502, "transfer_failed"),
    (503, "auth_unavailable"),
];

/// An MCP client that is not of this machine or of a page that may call, or speaks of another media type.
pub(super) const MCP: Failures = &[(403, "origin_refused"), (415, "bad_request")];
