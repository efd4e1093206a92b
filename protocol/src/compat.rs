//! Bodies of the doors for services of the original gateway (`connectors-api.md` §2.7). Shapes only; what they mean is
//! for the doors.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{EnvironmentName, ExecutorId, TurnId, WorkspaceId};

/// An executor as a workspace sees it. Times are RFC 3339 in UTC; what is not known is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConnectedExecutor {
    /// Its id.
    pub exe_id: ExecutorId,
    /// The workspace's name for it.
    pub name: EnvironmentName,
    /// What it is for.
    pub description: String,
    /// Whether it is chosen where none is named.
    pub is_default: bool,
    /// When it was last heard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_at: Option<String>,
    /// Since when it is connected; only while it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected_at: Option<String>,
    /// Whether it is connected now.
    pub is_online: bool,
}

/// A turn ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RevokeTurn {
    /// The turn.
    pub turn_id: TurnId,
    /// When its cap-tokens end by themselves, in Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exp: Option<i64>,
}

/// A person's machine is to become an executor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RegisterExecutor {
    /// What the person calls it. A workspace's name for it is given when it is bound.
    #[serde(default)]
    pub display_name: String,
}

/// The answer to [`RegisterExecutor`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RegisteredExecutor {
    /// Its new id.
    pub exe_id: ExecutorId,
}

/// A workspace may reach an executor from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BindExecutor {
    /// The executor.
    pub exe_id: ExecutorId,
    /// The workspace's name for it.
    pub name: EnvironmentName,
    /// What it is for; missing leaves it as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Whether it becomes the one that is chosen where none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_default: Option<bool>,
}

/// Two clients are to pass bytes from one executor to another (§2.6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CreateTransfer {
    /// Whose executors they are.
    pub workspace_id: WorkspaceId,
    /// From where.
    pub source_exe_id: String,
    /// To where.
    pub dest_exe_id: String,
    /// Time for the two sides to meet, in seconds; 0 and missing leave it to the gateway.
    #[serde(default)]
    pub ttl_seconds: u64,
    /// Bytes at most; 0 and missing set no limit.
    #[serde(default)]
    pub max_bytes: u64,
}

/// The answer to [`CreateTransfer`].
// The ticket is a right, so there is no `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CreatedTransfer {
    /// What both sides show as their bearer.
    pub ticket: String,
    /// Where the sender puts.
    pub upload_url: String,
    /// Where the receiver gets; the same.
    pub download_url: String,
    /// Until when the two sides have to meet; RFC 3339 in UTC.
    pub expires_at: String,
}
