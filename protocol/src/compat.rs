//! Bodies of the doors for services of the original gateway (`connectors-api.md` §2.7). Shapes only; what they mean is
//! for the doors.

use serde::{Deserialize, Serialize};

use crate::ids::{EnvironmentName, ExecutorId, TurnId};

/// An executor as a workspace sees it. Times are RFC 3339 in UTC; what is not known is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokeTurn {
    /// The turn.
    pub turn_id: TurnId,
    /// When its cap-tokens end by themselves, in Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exp: Option<i64>,
}

/// A person's machine is to become an executor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterExecutor {
    /// What the person calls it. A workspace's name for it is given when it is bound.
    #[serde(default)]
    pub display_name: String,
}

/// The answer to [`RegisterExecutor`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredExecutor {
    /// Its new id.
    pub exe_id: ExecutorId,
}

/// A workspace may reach an executor from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
