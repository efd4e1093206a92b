//! Bodies of the HTTP doors: connectors (`connectors-api.md` §2.2) and executors (§2.3, `codex-exec-server.md` §2).
//! Shapes only; what they mean is for the doors. What carries a right is left out of `Debug`.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The answer to every failed call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

impl ErrorBody {
    /// An error without the `ran` member.
    pub fn new(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { error: ErrorDetail { code: code.into(), message: message.into(), ran: None } }
    }
}

/// The inside of an [`ErrorBody`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorDetail {
    /// For programs.
    pub code: Cow<'static, str>,
    /// For people.
    pub message: String,
    /// Whether the work may have happened, where that is in doubt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ran: Option<Ran>,
}

/// Whether failed work happened at the executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Ran {
    /// It did not.
    No,
    /// Nobody can tell.
    Unknown,
}

/// The answer of `envs/list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "EnvList")]
pub struct EnvList<Tools = Vec<ToolInfo>> {
    /// Connected environments; empty, never missing.
    pub envs: Vec<Env<Tools>>,
}

/// One environment of a workspace. Who sends it may have `Tools` as JSON already.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Env")]
pub struct Env<Tools = Vec<ToolInfo>> {
    /// The workspace's name for the executor.
    pub name: String,
    /// Always `executor`.
    #[serde(rename = "type")]
    pub kind: Cow<'static, str>,
    /// Whether calls that name none go here.
    pub is_default: bool,
    /// What can be called.
    pub tools: Tools,
    /// RFC 3339, UTC, whole seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<String>,
}

/// One tool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ToolInfo {
    /// Its name.
    pub name: Cow<'static, str>,
    /// One sentence.
    pub description: Cow<'static, str>,
    /// Always `core`.
    pub kind: Cow<'static, str>,
    /// JSON schema of its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_schema: Option<Value>,
}

/// A call of one tool.
// `Debug` shows the tool only.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ToolCall {
    /// Its name; a missing one is an unknown one.
    #[serde(default)]
    pub tool: String,
    /// Its arguments; missing is `null`.
    #[serde(default)]
    pub arguments: Value,
}

impl fmt::Debug for ToolCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ToolCall").field("tool", &self.tool).finish_non_exhaustive()
    }
}

/// What a tool answers, also when it failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ToolResult {
    /// For models and people.
    pub content: Vec<Content>,
    /// For programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub structured_content: Option<Value>,
    /// Whether the tool failed.
    #[serde(default)]
    pub is_error: bool,
}

impl ToolResult {
    /// A success that says `text`.
    pub fn text(text: impl Into<String>) -> Self {
        Self { content: vec![Content::Text { text: text.into() }], structured_content: None, is_error: false }
    }

    /// A failure that says `text`.
    pub fn error(text: impl Into<String>) -> Self {
        Self { is_error: true, ..Self::text(text) }
    }
}

/// A piece of a tool's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Content {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
}

/// The only encryption executors offer.
pub const SECURITY_PROFILE: &str = "noise_hybrid_ik_v1";
/// The transport of executors that speak JSON-RPC in the open.
pub const DIRECT_TRANSPORT: &str = "direct_jsonrpc_v1";
/// The only kind of key.
pub const KEY_SUITE: &str = "Noise_hybridIK_X25519+MLKEM768_AESGCM_SHA256";

/// What executors of all kinds send to register. Older ones send nothing, or members that nobody needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RegisterRequest {
    /// [`SECURITY_PROFILE`] asks for the encrypted transport.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub security_profile: Option<String>,
    /// Comes with the profile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub executor_public_key: Option<HarnessKey>,
    /// [`DIRECT_TRANSPORT`] on that route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<String>,
}

/// The answer to a registration. Every kind of executor looks at its own members.
// `url` holds a ticket, so `Debug` leaves it out.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RegisterResponse {
    /// The executor's id, for older executors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The same, for older executors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executor_id: Option<String>,
    /// The id that was asked for; newer executors exit over another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment_id: Option<String>,
    /// What to dial.
    pub url: String,
    /// [`SECURITY_PROFILE`] on the encrypted transport.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security_profile: Option<String>,
    /// The registration, on the encrypted transport; it goes into the handshake byte for byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executor_registration_id: Option<String>,
    /// [`DIRECT_TRANSPORT`] on the direct transport.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<String>,
    /// The registration, on the direct transport.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registration_id: Option<String>,
}

impl fmt::Debug for RegisterResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegisterResponse")
            .field("environment_id", &self.environment_id)
            .field("security_profile", &self.security_profile)
            .field("transport", &self.transport)
            .finish_non_exhaustive()
    }
}

/// A harness asks for the way to an executor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConnectRequest {
    /// The key it will use.
    pub harness_public_key: HarnessKey,
}

/// The way to an executor.
// `url` and the authorization are rights, so `Debug` leaves them out.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConnectResponse {
    /// The id that was asked for.
    pub environment_id: String,
    /// What to dial.
    pub url: String,
    /// Always [`SECURITY_PROFILE`].
    pub security_profile: String,
    /// The executor's registration.
    pub executor_registration_id: String,
    /// The executor's key, which the harness pins.
    pub executor_public_key: HarnessKey,
    /// At most 4096 bytes; the executor brings it back to validate.
    pub harness_key_authorization: String,
}

impl fmt::Debug for ConnectResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectResponse")
            .field("environment_id", &self.environment_id)
            .field("executor_registration_id", &self.executor_registration_id)
            .finish_non_exhaustive()
    }
}

/// An executor asks whether a harness may talk to it.
// The authorization is a right, so `Debug` leaves it out.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ValidateRequest {
    /// The executor's registration.
    pub executor_registration_id: String,
    /// The key that the handshake has proven.
    pub harness_public_key: HarnessKey,
    /// What the harness brought.
    pub harness_key_authorization: String,
}

impl fmt::Debug for ValidateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ValidateRequest")
            .field("executor_registration_id", &self.executor_registration_id)
            .finish_non_exhaustive()
    }
}

/// The answer to a [`ValidateRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ValidateResponse {
    /// Whether the harness may.
    pub valid: bool,
}

/// A public key of a harness, or of an executor, as it stands in JSON.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HarnessKey {
    /// Always [`KEY_SUITE`].
    pub suite: String,
    /// Standard base64 of 32 bytes.
    pub x25519_public_key: String,
    /// Standard base64 of 1184 bytes.
    pub mlkem768_public_key: String,
}

impl fmt::Debug for HarnessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Public, but 1600 characters of it help nobody.
        f.debug_struct("HarnessKey").field("x25519_public_key", &self.x25519_public_key).finish_non_exhaustive()
    }
}

/// Why a key cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not [`KEY_SUITE`].
    #[error("the key is not of the suite {KEY_SUITE}")]
    Suite,
    /// Not standard base64 of 32 bytes.
    #[error("x25519_public_key is not the base64 of 32 bytes")]
    X25519,
    /// Not standard base64 of 1184 bytes.
    #[error("mlkem768_public_key is not the base64 of 1184 bytes")]
    MlKem768,
}

/// The bytes of a [`HarnessKey`].
#[derive(Clone, PartialEq, Eq)]
pub struct KeyBytes {
    /// The elliptic curve half.
    pub x25519: [u8; 32],
    /// The post-quantum half.
    pub mlkem768: Box<[u8; 1184]>,
}

impl HarnessKey {
    /// Checks suite and lengths. Keys are compared by these bytes, for base64 can be written in several ways.
    ///
    /// # Errors
    /// [`KeyError`] names the member.
    pub fn decode(&self) -> Result<KeyBytes, KeyError> {
        if self.suite != KEY_SUITE {
            return Err(KeyError::Suite);
        }
        let x25519 = STANDARD.decode(&self.x25519_public_key).ok().and_then(|bytes| bytes.try_into().ok());
        let mlkem768 = STANDARD.decode(&self.mlkem768_public_key).ok().and_then(|bytes| bytes.try_into().ok());
        Ok(KeyBytes { x25519: x25519.ok_or(KeyError::X25519)?, mlkem768: mlkem768.ok_or(KeyError::MlKem768)? })
    }
}

impl KeyBytes {
    /// SHA-256 over both halves, the X25519 one first: what a harness token is bound to.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::new().chain_update(self.x25519).chain_update(self.mlkem768.as_slice()).finalize().into()
    }

    /// The key as it stands in JSON.
    pub fn encode(&self) -> HarnessKey {
        HarnessKey {
            suite: KEY_SUITE.to_owned(),
            x25519_public_key: STANDARD.encode(self.x25519),
            mlkem768_public_key: STANDARD.encode(self.mlkem768.as_slice()),
        }
    }
}

impl fmt::Debug for KeyBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyBytes").field("x25519", &STANDARD.encode(self.x25519)).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{json, to_string, to_value};

    use super::*;

    #[test]
    fn errors_tell_whether_work_ran_only_where_that_is_in_doubt() {
        let plain = ErrorBody::new("unknown_tool", "no such tool: x");
        assert_eq!(to_string(&plain).unwrap(), r#"{"error":{"code":"unknown_tool","message":"no such tool: x"}}"#);
        let mut doubtful = ErrorBody::new("executor_unreachable", "gone");
        doubtful.error.ran = Some(Ran::Unknown);
        assert_eq!(to_value(&doubtful).unwrap()["error"]["ran"], "unknown");
    }

    #[test]
    fn an_environment_stands_on_the_wire_as_existing_clients_read_it() {
        let tool = ToolInfo {
            name: "shell".into(),
            description: "Run a command synchronously.".into(),
            kind: "core".into(),
            input_schema: None,
        };
        let mut env = Env {
            name: "my-mac".into(),
            kind: "executor".into(),
            is_default: false,
            tools: vec![tool],
            last_seen: Some("2026-05-20T10:00:00Z".into()),
        };
        assert_eq!(
            to_string(&EnvList { envs: vec![env.clone()] }).unwrap(),
            concat!(
                r#"{"envs":[{"name":"my-mac","type":"executor","is_default":false,"tools":[{"name":"shell","#,
                r#""description":"Run a command synchronously.","kind":"core"}],"last_seen":"2026-05-20T10:00:00Z"}]}"#
            )
        );
        env.last_seen = None;
        env.tools[0].input_schema = Some(json!({"type": "object"}));
        let value = to_value(env).unwrap();
        assert_eq!(value.get("last_seen"), None);
        assert_eq!(value["tools"][0]["inputSchema"]["type"], "object");
        assert_eq!(to_string(&EnvList::<Vec<ToolInfo>>::default()).unwrap(), r#"{"envs":[]}"#);
    }

    #[test]
    fn missing_arguments_reach_a_tool_as_null() {
        let call: ToolCall = serde_json::from_str(r#"{"tool":"shell","new":1}"#).unwrap();
        assert_eq!(call, ToolCall { tool: "shell".into(), arguments: Value::Null });
        assert!(serde_json::from_str::<ToolCall>(r#"{"tool":1}"#).is_err());
    }

    #[test]
    fn a_tool_result_always_says_whether_it_is_an_error() {
        assert_eq!(
            to_string(&ToolResult::text("ok")).unwrap(),
            r#"{"content":[{"type":"text","text":"ok"}],"isError":false}"#
        );
        let failed = ToolResult { structured_content: Some(json!({"exit_code": null})), ..ToolResult::error("no") };
        assert_eq!(
            to_string(&failed).unwrap(),
            r#"{"content":[{"type":"text","text":"no"}],"structuredContent":{"exit_code":null},"isError":true}"#
        );
    }

    #[test]
    fn executors_of_every_kind_can_register() {
        let direct: RegisterRequest = serde_json::from_str(r#"{"transport":"direct_jsonrpc_v1"}"#).unwrap();
        assert_eq!(direct.transport.as_deref(), Some(DIRECT_TRANSPORT));
        let agentx: RegisterRequest = serde_json::from_str(r#"{"id":"exe_1","public_key":""}"#).unwrap();
        assert_eq!(agentx, RegisterRequest::default());
        let key = KeyBytes { x25519: [1; 32], mlkem768: Box::new([2; 1184]) }.encode();
        let noise = json!({"security_profile": SECURITY_PROFILE, "executor_public_key": key});
        let noise: RegisterRequest = serde_json::from_value(noise).unwrap();
        assert_eq!(noise.executor_public_key, Some(key));
    }

    #[test]
    fn a_registration_answers_only_what_its_kind_of_executor_reads() {
        let answer = RegisterResponse {
            environment_id: Some("exe_1".into()),
            url: "ws://h/x".into(),
            transport: Some(DIRECT_TRANSPORT.into()),
            registration_id: Some("exr_1".into()),
            ..RegisterResponse::default()
        };
        let wanted = json!({"environment_id": "exe_1", "url": "ws://h/x", "transport": "direct_jsonrpc_v1", "registration_id": "exr_1"});
        assert_eq!(to_value(answer).unwrap(), wanted);
    }

    #[test]
    fn keys_are_compared_by_their_bytes_and_refused_by_name() {
        let bytes = KeyBytes { x25519: [1; 32], mlkem768: Box::new([2; 1184]) };
        let key = bytes.encode();
        assert_eq!((key.x25519_public_key.len(), key.mlkem768_public_key.len()), (44, 1580));
        assert_eq!(key.decode(), Ok(bytes));
        assert_eq!(HarnessKey { suite: "other".into(), ..key.clone() }.decode(), Err(KeyError::Suite));
        let short = HarnessKey { x25519_public_key: STANDARD.encode([1; 31]), ..key.clone() };
        assert_eq!(short.decode(), Err(KeyError::X25519));
        assert_eq!(HarnessKey { mlkem768_public_key: "?".into(), ..key }.decode(), Err(KeyError::MlKem768));
    }

    #[test]
    fn debug_output_shows_no_rights() {
        let key = KeyBytes { x25519: [1; 32], mlkem768: Box::new([2; 1184]) }.encode();
        let secret = || "secret".to_owned();
        let validate = ValidateRequest {
            executor_registration_id: "exr_1".into(),
            harness_public_key: key.clone(),
            harness_key_authorization: secret(),
        };
        let connect = ConnectResponse {
            environment_id: "exe_1".into(),
            url: secret(),
            security_profile: SECURITY_PROFILE.into(),
            executor_registration_id: "exr_1".into(),
            executor_public_key: key,
            harness_key_authorization: secret(),
        };
        let register = RegisterResponse { url: secret(), ..RegisterResponse::default() };
        let call = ToolCall { tool: "shell".into(), arguments: json!({"env": "secret"}) };
        assert!(!format!("{validate:?}{connect:?}{register:?}{call:?}").contains("secret"));
    }
}
