//! The encrypted channel of one stream, where the gateway is the end of it: a hybrid Noise IK handshake with
//! X25519 and ML-KEM-768, then AES-256-GCM records (codex-exec-server.md §4).
//!
//! A [`Channel`] belongs to one stream and is never reused: its nonces are implicit, so each record is sealed and
//! opened exactly once and in order.

use bytes::{Bytes, BytesMut};
use clatter::bytearray::ByteArray;
use clatter::crypto::cipher::AesGcm;
use clatter::crypto::dh::X25519;
use clatter::crypto::hash::Sha256;
use clatter::crypto::kem::rust_crypto_ml_kem::MlKem768;
use clatter::handshakepattern::noise_hybrid_ik;
use clatter::traits::{Dh, Handshaker, Kem};
use clatter::transportstate::TransportState;
use clatter::{HybridHandshake, HybridHandshakeParams, KeyPair};
use sha2::Digest;

use crate::protocol::frame::StreamId;
use crate::protocol::ids::{ExecutorId, RegistrationId};
use crate::protocol::rest::KeyBytes;

type Handshake = HybridHandshake<X25519, MlKem768, MlKem768, AesGcm, Sha256>;

/// Bytes of an X25519 public key followed by an ML-KEM-768 public key.
pub const PUBLIC_KEY_BYTES: usize = X25519_BYTES + MLKEM_BYTES;
/// What a record grows by when it is sealed.
pub const TAG_BYTES: usize = 16;

const X25519_BYTES: usize = 32;
const MLKEM_BYTES: usize = 1184;
/// Noise bounds every message by this.
const NOISE_MESSAGE_MAX: usize = 65_535;
const PROLOGUE: &str = "codex-exec-server-relay-noise/v1";
/// The executor's answer when its own credential was refused at `/validate` (codex-exec-server.md §2.3).
const CREDENTIAL_REJECTED: &[u8] = b"codex-registry-authentication-rejected/v1";

/// Why a stream could not be encrypted.
#[derive(Debug, thiserror::Error)]
pub enum NoiseError {
    /// The executor's public key has another length than its suite demands.
    #[error("the executor's public key has {0} bytes instead of {PUBLIC_KEY_BYTES}")]
    PublicKey(usize),
    /// The peer's message does not authenticate.
    #[error("the encrypted handshake failed: {0}")]
    Handshake(clatter::error::HandshakeError),
    /// The executor was refused when it asked whether to trust us.
    #[error("the executor's credential was refused while it validated the handshake")]
    CredentialRejected,
    /// A record was altered, repeated or reordered.
    #[error("a record does not decrypt: {0}")]
    Record(clatter::error::TransportError),
    /// No key pair could be made.
    #[error("no key pair could be made: {0}")]
    Keys(String),
}

/// The gateway's identity towards executors, made anew at each start and reload: it proves nothing by itself, each handshake
/// carries its own authorization.
pub struct GatewayIdentity {
    dh: KeyPair<<X25519 as Dh>::PubKey, <X25519 as Dh>::PrivateKey>,
    kem: KeyPair<<MlKem768 as Kem>::PubKey, <MlKem768 as Kem>::SecretKey>,
    key_digest: [u8; 32],
}

impl std::fmt::Debug for GatewayIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GatewayIdentity(***)")
    }
}

impl GatewayIdentity {
    /// Makes a fresh identity.
    ///
    /// # Errors
    /// [`NoiseError::Keys`] when the system gives no random bytes.
    pub fn generate() -> Result<Self, NoiseError> {
        let dh = X25519::genkey().map_err(|error| NoiseError::Keys(error.to_string()))?;
        let kem = MlKem768::genkey().map_err(|error| NoiseError::Keys(error.to_string()))?;
        let mut hash = sha2::Sha256::new();
        hash.update(dh.public.as_slice());
        hash.update(kem.public.as_slice());
        Ok(Self { key_digest: hash.finalize().into(), dh, kem })
    }

    /// The public keys.
    pub fn public_key(&self) -> KeyBytes {
        let mlkem768 = Box::new(self.kem.public.as_slice().try_into().expect("the length of such a key"));
        KeyBytes { x25519: self.dh.public, mlkem768 }
    }

    /// SHA-256 of the public keys, which an authorization is bound to.
    pub fn key_digest(&self) -> [u8; 32] {
        self.key_digest
    }
}

/// What both ends hash into the handshake besides their keys.
pub struct Context<'a> {
    /// The environment the executor registered for, which is its own id.
    pub executor: &'a ExecutorId,
    /// The registration whose key the executor uses.
    pub registration: &'a RegistrationId,
    /// The stream that will carry the records.
    pub stream: &'a StreamId,
}

impl Context<'_> {
    fn prologue(&self) -> Vec<u8> {
        let parts = [PROLOGUE, self.executor.as_str(), self.registration.as_str(), self.stream.as_str()];
        let mut prologue = Vec::with_capacity(parts.iter().map(|part| 8 + part.len()).sum());
        for part in parts {
            prologue.extend_from_slice(&(part.len() as u64).to_be_bytes());
            prologue.extend_from_slice(part.as_bytes());
        }
        prologue
    }
}

/// A handshake that waits for the executor's answer.
pub struct Pending(Box<Handshake>);

impl Pending {
    /// Begins a handshake with the executor that owns `public_key`; gives the first message for it.
    ///
    /// # Errors
    /// [`NoiseError::PublicKey`] or [`NoiseError::Handshake`] when the key is not one of this suite.
    pub fn initiate(
        identity: &GatewayIdentity,
        public_key: &[u8],
        context: &Context<'_>,
        authorization: &[u8],
    ) -> Result<(Self, Bytes), NoiseError> {
        if public_key.len() != PUBLIC_KEY_BYTES {
            return Err(NoiseError::PublicKey(public_key.len()));
        }
        let (dh, kem) = public_key.split_at(X25519_BYTES);
        let prologue = context.prologue();
        let params = HybridHandshakeParams::new(noise_hybrid_ik(), true)
            .with_prologue(&prologue)
            .with_s(identity.dh.clone())
            .with_s_kem(identity.kem.clone())
            .with_rs(<X25519 as Dh>::PubKey::from_slice(dh))
            .with_rs_kem(<MlKem768 as Kem>::PubKey::from_slice(kem));
        let mut handshake = Handshake::new(params).map_err(NoiseError::Handshake)?;
        let mut message = vec![0; NOISE_MESSAGE_MAX];
        let length = handshake.write_message(authorization, &mut message).map_err(NoiseError::Handshake)?;
        message.truncate(length);
        message.shrink_to_fit();
        Ok((Self(Box::new(handshake)), message.into()))
    }

    /// Takes the executor's answer and gives the channel.
    ///
    /// # Errors
    /// [`NoiseError::Handshake`] when it does not authenticate, [`NoiseError::CredentialRejected`] when the executor
    /// says that its own credential was refused.
    pub fn finish(mut self, answer: &[u8]) -> Result<Channel, NoiseError> {
        let mut payload = vec![0; NOISE_MESSAGE_MAX];
        let length = self.0.read_message(answer, &mut payload).map_err(NoiseError::Handshake)?;
        if payload[..length] == *CREDENTIAL_REJECTED {
            return Err(NoiseError::CredentialRejected);
        }
        let transport = self.0.finalize().map_err(NoiseError::Handshake)?;
        Ok(Channel(Box::new(transport)))
    }
}

/// One encrypted conversation.
pub struct Channel(Box<TransportState<AesGcm, Sha256>>);

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Channel(***)")
    }
}

impl Channel {
    /// Seals one record at the end of `out`, which grows by the record and [`TAG_BYTES`].
    ///
    /// # Errors
    /// [`NoiseError::Record`] when the record is too long for one Noise message.
    pub fn seal(&mut self, record: &[u8], out: &mut BytesMut) -> Result<(), NoiseError> {
        let start = out.len();
        out.resize(start + record.len() + TAG_BYTES, 0);
        let length = self.0.send(record, &mut out[start..]).map_err(NoiseError::Record)?;
        out.truncate(start + length);
        Ok(())
    }

    /// Opens one record.
    ///
    /// # Errors
    /// [`NoiseError::Record`] when it was altered or is out of order; the channel is then useless.
    pub fn open(&mut self, record: &[u8]) -> Result<Bytes, NoiseError> {
        let mut plain = vec![0; record.len().saturating_sub(TAG_BYTES)];
        let length = self.0.receive(record, &mut plain).map_err(NoiseError::Record)?;
        plain.truncate(length);
        Ok(plain.into())
    }
}
