//! Tickets: the short right of one executor to connect its socket, carried in a URL.
//!
//! Owned by [`super::Auth`]. Checked, not stored: any number of uses until they expire, since executors redial the
//! same URL.

use exec_gateway_protocol::ids::ExecutorId;
use exec_gateway_protocol::ticket;
pub use exec_gateway_protocol::ticket::TicketError;

use super::Clock;
use super::cap_token::keys;
use crate::config;
use crate::store::Keyring;

/// Mints and verifies tickets.
pub struct Tickets {
    keys: Keyring,
    clock: Clock,
    ttl_secs: u64,
}

impl Tickets {
    pub(super) fn new(keys: Keyring, config: &config::Auth, clock: Clock) -> Self {
        Self { keys, clock, ttl_secs: config.ticket_ttl_secs }
    }

    /// A ticket of this executor, good for `auth.ticket_ttl_secs` from now.
    pub fn mint(&self, executor: &ExecutorId) -> String {
        let expires_at = self.clock.unix_secs().saturating_add(self.ttl_secs);
        ticket::mint(executor, expires_at, &self.keys.current.secret)
    }

    /// Checks that the ticket was minted for this executor and has not expired.
    ///
    /// # Errors
    /// [`TicketError`] says what is wrong with it; the caller of a socket is told none of it.
    pub fn verify(&self, ticket: &str, executor: &ExecutorId) -> Result<(), TicketError> {
        let now = self.clock.unix_secs();
        for key in keys(&self.keys) {
            match ticket::verify(ticket, executor, now, &key.secret) {
                Err(TicketError::BadSignature) => {}
                verdict => return verdict,
            }
        }
        Err(TicketError::BadSignature)
    }
}
