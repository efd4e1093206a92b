//! Tickets: the short right of one executor to connect its socket, carried in a URL.
//!
//! Owned by [`super::Auth`]. Checked, not stored: any number of uses until they expire, since executors redial the
//! same URL.

use exec_gateway_protocol::ids::ExecutorId;
use exec_gateway_protocol::ticket::{self, TicketError};

use super::Clock;
use super::keys::{Keys, verifying};
use crate::config::{self, Live};

/// Mints and verifies tickets.
pub struct Tickets {
    keys: Keys,
    clock: Clock,
    settings: Live<config::Auth>,
}

impl Tickets {
    pub(super) fn new(keys: Keys, settings: Live<config::Auth>, clock: Clock) -> Self {
        Self { keys, clock, settings }
    }

    /// A ticket of this executor, good for `auth.ticket_ttl_secs` from now.
    pub fn mint(&self, executor: &ExecutorId) -> String {
        let expires_at = self.clock.unix_secs().saturating_add(self.settings.now().ticket_ttl_secs);
        ticket::mint(executor, expires_at, &self.keys.now().current.secret)
    }

    /// Checks that the ticket was minted for this executor and has not expired.
    ///
    /// # Errors
    /// [`TicketError`] says what is wrong with it; the caller of a socket is told none of it.
    pub fn verify(&self, ticket: &str, executor: &ExecutorId) -> Result<(), TicketError> {
        let now = self.clock.unix_secs();
        let ring = self.keys.now();
        for key in verifying(&ring) {
            match ticket::verify(ticket, executor, now, &key.secret) {
                Err(TicketError::BadSignature) => {}
                verdict => return verdict,
            }
        }
        Err(TicketError::BadSignature)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::auth::doubles::{FakeClock, ring};

    fn tickets(current: u8, previous: Option<u8>, clock: &FakeClock) -> Tickets {
        Tickets::new(ring(current, previous), config::Auth::default().into(), clock.clock())
    }

    #[test]
    fn a_ticket_opens_for_its_executor_as_often_as_it_likes_for_a_day() {
        let clock = FakeClock::at(1_000);
        let tickets = tickets(1, None, &clock);
        let (executor, other) = ("exe_1".parse().unwrap(), "exe_2".parse().unwrap());
        let ticket = tickets.mint(&executor);
        clock.advance(86_399);
        assert_eq!(tickets.verify(&ticket, &executor), Ok(()));
        assert_eq!(tickets.verify(&ticket, &executor), Ok(()));
        assert_eq!(tickets.verify(&ticket, &other), Err(TicketError::WrongExecutor));
        clock.advance(1);
        assert_eq!(tickets.verify(&ticket, &executor), Err(TicketError::Expired));
    }

    #[test]
    fn a_ticket_of_the_previous_key_is_good_and_one_of_a_strange_key_is_not() {
        let clock = FakeClock::at(1_000);
        let executor = "exe_1".parse().unwrap();
        let verifier = tickets(2, Some(1), &clock);
        assert_eq!(verifier.verify(&tickets(1, None, &clock).mint(&executor), &executor), Ok(()));
        let strange = tickets(3, None, &clock).mint(&executor);
        assert_eq!(verifier.verify(&strange, &executor), Err(TicketError::BadSignature));
    }
}
