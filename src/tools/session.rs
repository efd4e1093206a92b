//! The process session that a call names: what the tools on sessions share.

use std::sync::Arc;

use super::{Call, ToolError};
use crate::session::{Session, SessionError};

/// The session of that id, at that environment where one is named. One of another workspace or environment answers as
/// an unknown one.
pub(super) fn find(call: &Call, session_id: &str, environment_id: Option<&str>) -> Result<Arc<Session>, ToolError> {
    let session = call.sessions.get(call.workspace.id(), session_id)?;
    if environment_id.is_some_and(|name| name != session.environment) {
        return Err(SessionError::Unknown(session_id.to_owned()).into());
    }
    Ok(session)
}
