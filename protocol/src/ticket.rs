//! Tickets: the right of one executor to connect, `<exe>.<exp>.<mac>` (`connectors-api.md` §3.3). Checked, never
//! stored, so any number of uses is fine until they expire.

use crate::ids::ExecutorId;
use crate::mac;

/// Why a ticket is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Not of the form of a ticket.
    #[error("the ticket is malformed")]
    Malformed,
    /// Made for another executor.
    #[error("the ticket belongs to another executor")]
    WrongExecutor,
    /// Its time is over.
    #[error("the ticket has expired")]
    Expired,
    /// Signed by another key.
    #[error("the ticket's signature is wrong")]
    BadSignature,
}

/// A ticket for `exe` that is valid before `exp` (Unix seconds).
pub fn mint(exe: &ExecutorId, exp: u64, secret: &[u8]) -> String {
    let signed = format!("{exe}.{exp}");
    let mac = mac::sign(secret, &signed);
    format!("{signed}.{mac}")
}

/// Checks a ticket for `exe` at the Unix second `now`.
///
/// # Errors
/// Form, executor, time and signature in this order. Only a ticket that passes proves anything: before the signature
/// is checked, the other answers are what its bearer made up.
pub fn verify(ticket: &str, exe: &ExecutorId, now: u64, secret: &[u8]) -> Result<(), TicketError> {
    let (signed, mac) = ticket.rsplit_once('.').ok_or(TicketError::Malformed)?;
    let (for_exe, exp) = signed.split_once('.').ok_or(TicketError::Malformed)?;
    if exp.contains('.') {
        return Err(TicketError::Malformed);
    }
    if for_exe != exe.as_str() {
        return Err(TicketError::WrongExecutor);
    }
    let exp: u64 = exp.parse().map_err(|_| TicketError::Malformed)?;
    if now >= exp {
        return Err(TicketError::Expired);
    }
    let mac = mac::decode(mac).ok_or(TicketError::Malformed)?;
    if mac::verify(secret, signed, &mac) { Ok(()) } else { Err(TicketError::BadSignature) }
}
