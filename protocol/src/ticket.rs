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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"golden-secret";
    // Computed with Python's hmac, independently of this crate.
    const GOLDEN: &str = "exe_1.1700000300.gouRUo-GQF7LTYraeNcz6baU_mQ4stfoYGqQjfsCESM";

    fn exe(id: &str) -> ExecutorId {
        ExecutorId::new(id).unwrap()
    }

    #[test]
    fn tickets_are_minted_to_the_letter_of_the_original() {
        assert_eq!(mint(&exe("exe_1"), 1_700_000_300, SECRET), GOLDEN);
    }

    #[test]
    fn a_ticket_is_good_until_the_second_of_its_expiry() {
        assert_eq!(verify(GOLDEN, &exe("exe_1"), 1_700_000_299, SECRET), Ok(()));
        assert_eq!(verify(GOLDEN, &exe("exe_1"), 1_700_000_300, SECRET), Err(TicketError::Expired));
    }

    #[test]
    fn every_fault_of_a_ticket_has_its_name() {
        let fault = |ticket: &str| verify(ticket, &exe("exe_1"), 0, SECRET).err();
        assert_eq!(verify(GOLDEN, &exe("exe_2"), 0, SECRET), Err(TicketError::WrongExecutor));
        assert_eq!(verify(GOLDEN, &exe("exe_1"), 0, b"other"), Err(TicketError::BadSignature));
        assert_eq!(fault(&GOLDEN.replace("0300", "0301")), Some(TicketError::BadSignature));
        for ticket in ["", "exe_1", "exe_1.5", "exe_1.5.6.AA", "exe_1.x.AA", "exe_1.-5.AA", "exe_1.5.?"] {
            assert_eq!(fault(ticket), Some(TicketError::Malformed), "{ticket}");
        }
        assert_eq!(fault("exe_1.5."), Some(TicketError::BadSignature));
    }

    #[test]
    fn an_unset_secret_verifies_nothing() {
        let forged = mint(&exe("exe_1"), 9, b"");
        assert_eq!(verify(&forged, &exe("exe_1"), 0, b""), Err(TicketError::BadSignature));
    }
}
