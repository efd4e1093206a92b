//! What operators change and list, as plain requests: the same code serves the running daemon's `admin.sock` and a
//! command that opens the store itself because no daemon runs.

use std::time::Duration;

use exec_gateway_protocol::ids::{EnvironmentName, ExecutorId, TokenId, TurnId, UserId, WorkspaceId};
use serde::{Deserialize, Serialize};

/// One operator command.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    /// Makes a proxy token.
    TokenCreate { workspace: WorkspaceId, user: Option<UserId>, ttl: Option<Duration>, read_only: bool },
    /// Lists proxy tokens without the secrets.
    TokenList,
    /// Ends a proxy token at once.
    TokenRevoke { id: TokenId },
    /// Makes an executor and binds it.
    ExecutorCreate { workspace: WorkspaceId, name: EnvironmentName, default: bool },
    /// Lists executors with their bindings, of one workspace or all.
    ExecutorList { workspace: Option<WorkspaceId> },
    /// Lets a workspace reach an executor.
    ExecutorBind { executor: ExecutorId, workspace: WorkspaceId, name: EnvironmentName, default: bool },
    /// Takes that right away.
    ExecutorUnbind { executor: ExecutorId, workspace: WorkspaceId },
    /// Gives an executor another name in a workspace.
    ExecutorRename { executor: ExecutorId, workspace: WorkspaceId, name: EnvironmentName },
    /// Forgets an executor, its bindings and its credential.
    ExecutorDelete { executor: ExecutorId },
    /// Mints one cap-token.
    CapToken { workspace: WorkspaceId, turn: Option<TurnId>, user: Option<UserId>, ttl: Duration },
    /// Revokes the cap-tokens of a turn.
    RevokeTurn { turn: TurnId },
    /// Revokes the cap-tokens of a workspace issued so far.
    RevokeWorkspace { workspace: WorkspaceId },
}
