//! Every failure → status, code, message: the only place where status codes are chosen.

use std::error::Error;
use std::sync::Arc;

use hyper::header::{HeaderName, HeaderValue};

use crate::admin::AdminError;
use crate::audit::AuditError;
use crate::auth::AuthError;
use crate::edge::body::BodyError;
use crate::edge::upgrade::UpgradeError;
use crate::ops::memory::Overloaded;
use crate::protocol::rest::Ran;
use crate::relay::client::{CallError, ConnectError};
use crate::relay::conversation::HandshakeError;
use crate::session::{SessionError, StdinError};
use crate::store::StoreError;
use crate::tools::{FileError, ToolError};
use crate::transfer::TransferError;
use crate::workspace::pace::TooFast;
use crate::workspace::{ReachError, TooManyCalls};

/// An answer that says what went wrong. `message` is for the caller, `cause` for the log: a caller never learns an
/// address or another tenant's name.
#[derive(Debug)]
pub struct ApiError {
    status: u16,
    code: &'static str,
    message: String,
    ran: Option<Ran>,
    retry_after_secs: Option<u64>,
    headers: Vec<(HeaderName, HeaderValue)>,
    cause: Option<String>,
}

impl ApiError {
    /// An error with its status, code and text for the caller.
    pub fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            ran: None,
            retry_after_secs: None,
            headers: Vec::new(),
            cause: None,
        }
    }

    /// A fault of the gateway itself.
    pub fn internal(message: &str) -> Self {
        Self::new(500, "internal", message)
    }

    /// Says when another try is worthwhile, in whole seconds.
    pub fn retry_after(mut self, secs: u64) -> Self {
        self.retry_after_secs = Some(secs);
        self
    }

    /// Says whether the call may have run.
    pub fn with_ran(mut self, ran: Ran) -> Self {
        self.ran = Some(ran);
        self
    }

    /// The same in other words, where callers know them.
    pub fn in_words(mut self, message: &str) -> Self {
        message.clone_into(&mut self.message);
        self
    }

    /// Adds a header to the answer.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Keeps what failed, for the log.
    pub fn caused_by(mut self, error: &(dyn Error + 'static)) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        self.cause = Some(text);
        self
    }

    /// HTTP status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Machine-readable code.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// Text for the caller.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Whether the call may have run, where that is in question.
    pub fn ran(&self) -> Option<Ran> {
        self.ran
    }

    /// When to try again, in seconds.
    pub fn retry_after_secs(&self) -> Option<u64> {
        self.retry_after_secs
    }

    /// Further headers of the answer.
    pub fn headers(&self) -> &[(HeaderName, HeaderValue)] {
        &self.headers
    }

    /// What failed, for the log.
    pub fn cause(&self) -> Option<&str> {
        self.cause.as_deref()
    }
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        let (status, code) = match &error {
            AuthError::MissingBearer => (401, "missing_bearer"),
            AuthError::Invalid | AuthError::Expired | AuthError::Revoked => (401, "invalid_token"),
            AuthError::Unavailable { .. } => (503, "auth_unavailable"),
        };
        let refused = Self::new(status, code, error.to_string()).caused_by(&error);
        if status == 503 { refused.retry_after(2) } else { refused }
    }
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        let (status, code) = match error {
            BodyError::TooLarge(_) => (413, "body_too_large"),
            BodyError::Timeout(_) => (408, "body_timeout"),
            BodyError::Broken => (400, "bad_request"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<UpgradeError> for ApiError {
    fn from(error: UpgradeError) -> Self {
        match error {
            UpgradeError::NotWebSocket => Self::new(426, "upgrade_required", error.to_string())
                .with_header(hyper::header::UPGRADE, HeaderValue::from_static("websocket")),
            // RFC 6455 §4.4 names the version that is understood.
            UpgradeError::Version => Self::new(426, "upgrade_required", error.to_string())
                .with_header(hyper::header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13")),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::new(503, "store_unavailable", "the gateway's store does not answer").retry_after(2).caused_by(&error)
    }
}

impl From<AdminError> for ApiError {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Refused(message) => Self::new(400, "bad_request", message),
            AdminError::NotFound(message) => Self::new(404, "not_found", message),
            AdminError::Conflict(message) => Self::new(409, "conflict", message),
            AdminError::Unavailable(_) | AdminError::Damaged(_) => {
                Self::new(503, "store_unavailable", "the gateway's store does not answer")
                    .retry_after(2)
                    .caused_by(&error)
            }
        }
    }
}

impl From<AuditError> for ApiError {
    fn from(error: AuditError) -> Self {
        match error {
            AuditError::Unavailable => Self::new(503, "audit_unavailable", error.to_string()).retry_after(2),
        }
    }
}

impl From<TooFast> for ApiError {
    fn from(error: TooFast) -> Self {
        Self::new(429, "rate_limited", error.to_string()).retry_after(error.wait.as_secs() + 1)
    }
}

impl From<Overloaded> for ApiError {
    fn from(error: Overloaded) -> Self {
        Self::new(503, "overloaded", error.to_string()).retry_after(1)
    }
}

impl From<TooManyCalls> for ApiError {
    fn from(error: TooManyCalls) -> Self {
        Self::new(429, "too_many_calls", error.to_string()).retry_after(1)
    }
}

impl From<&ReachError> for ApiError {
    fn from(error: &ReachError) -> Self {
        let message = error.to_string();
        match error {
            ReachError::NoEnvironment(_) => Self::new(404, "env_not_found", message),
            ReachError::WhichEnvironment(_) => Self::new(400, "environment_required", message),
            ReachError::NotConnected(_) => Self::new(503, "executor_not_connected", message).retry_after(2),
            ReachError::TooManyStreams => Self::new(429, "too_many_streams", message).retry_after(1),
            ReachError::StreamTaken => Self::new(409, "stream_taken", message),
            ReachError::Unreachable { source, .. } => {
                let (status, code) = match &**source {
                    ConnectError::Handshake(HandshakeError::Timeout)
                    | ConnectError::Initialize(CallError::NoAnswer) => (504, "executor_timeout"),
                    ConnectError::Handshake(_) | ConnectError::Initialize(_) => (502, "executor_unreachable"),
                };
                Self::new(status, code, message).with_ran(Ran::No).caused_by(error)
            }
            ReachError::Failed => Self::internal(&message).with_ran(Ran::No),
            ReachError::Refused(_) => Self::new(403, "forbidden", message).caused_by(error),
            ReachError::Store(_) => Self::new(503, "store_unavailable", message).retry_after(2).caused_by(error),
        }
    }
}

impl From<&SessionError> for ApiError {
    fn from(error: &SessionError) -> Self {
        let message = error.to_string();
        match error {
            SessionError::Unknown(_) => Self::new(404, "session_not_found", message),
            SessionError::TooMany(_) => Self::new(429, "too_many_sessions", message).retry_after(5),
            SessionError::TooManyStreams(_) => Self::new(429, "too_many_streams", message).retry_after(5),
            SessionError::KeyConflict => Self::new(409, "idempotency_conflict", message),
            SessionError::Store(_) | SessionError::Disk(_) | SessionError::Unreadable(_) => {
                Self::new(503, "store_unavailable", message).retry_after(2).caused_by(error)
            }
            SessionError::NotStarted(_) => Self::new(502, "executor_unreachable", message).with_ran(Ran::No),
            SessionError::StartUnknown => Self::new(502, "executor_unreachable", message).with_ran(Ran::Unknown),
            SessionError::StartPending => Self::new(504, "executor_timeout", message).with_ran(Ran::Unknown),
        }
    }
}

impl From<SessionError> for ApiError {
    fn from(error: SessionError) -> Self {
        Self::from(&error)
    }
}

impl From<StdinError> for ApiError {
    fn from(error: StdinError) -> Self {
        let (status, code) = match error {
            StdinError::Closed => (409, "stdin_closed"),
            StdinError::Full { .. } => (429, "stdin_full"),
            StdinError::Gap { .. } | StdinError::Changed { .. } => (409, "stdin_offset"),
            StdinError::Endless | StdinError::EofUnsupported => (409, "eof_unsupported"),
            StdinError::Lost => (503, "executor_not_connected"),
        };
        let refused = Self::new(status, code, error.to_string());
        if matches!(status, 429 | 503) { refused.retry_after(1) } else { refused }
    }
}

impl From<Arc<ReachError>> for ApiError {
    fn from(error: Arc<ReachError>) -> Self {
        Self::from(&*error)
    }
}

impl From<ReachError> for ApiError {
    fn from(error: ReachError) -> Self {
        Self::from(&error)
    }
}

impl From<TransferError> for ApiError {
    fn from(error: TransferError) -> Self {
        let message = error.to_string();
        match error {
            TransferError::Unknown => Self::new(404, "transfer_not_found", message),
            TransferError::TooMany(_) => Self::new(429, "too_many_transfers", message).retry_after(5),
            TransferError::Claimed(_) => Self::new(423, "transfer_claimed", message),
            TransferError::Alone(_) => Self::new(408, "transfer_alone", message),
            TransferError::Over => Self::new(410, "transfer_over", message),
            TransferError::Failed(_) => Self::new(502, "transfer_failed", message),
        }
    }
}

impl From<FileError> for ApiError {
    fn from(error: FileError) -> Self {
        let failure = match error {
            FileError::Tool(error) => return error.into(),
            FileError::Failed(failure) => failure,
        };
        let status = match failure.code {
            "invalid" => 400,
            "no_permission" => 403,
            "not_found" => 404,
            "changed" | "exists" => 412,
            "too_large" => 413,
            "no_space" => 507,
            // What is there is of another kind, and the rest of what systems say.
            _ => 409,
        };
        // That which is for an environment, or a path of ours, has this code too.
        let code = if status == 404 { "file_not_found" } else { failure.code };
        Self::new(status, code, failure.message)
    }
}

impl From<ToolError> for ApiError {
    fn from(error: ToolError) -> Self {
        let message = error.to_string();
        match error {
            ToolError::Arguments(_) => Self::new(400, "bad_arguments", message),
            ToolError::Reach(reach) => Self::from(&*reach),
            ToolError::Overloaded(overloaded) => Self::from(overloaded).with_ran(Ran::No),
            ToolError::Lost { ran } => Self::new(502, "executor_unreachable", message).with_ran(ran),
            ToolError::NoAnswer { ran } => Self::new(504, "executor_timeout", message).with_ran(ran),
            ToolError::End { error, .. } => Self::from(*error).in_words(&message),
            ToolError::Session(session) => Self::from(&session),
            ToolError::Stdin(stdin) => Self::from(stdin),
            ToolError::Malformed(cause) => {
                Self::new(502, "executor_unreachable", message).with_ran(Ran::Unknown).caused_by(&cause)
            }
        }
    }
}
