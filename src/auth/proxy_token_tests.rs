#![allow(clippy::unwrap_used)]

use exec_gateway_protocol::ids::WorkspaceId;
use futures_util::{StreamExt, future, stream};

use super::*;
use crate::auth::doubles::{FakeClock, FakeValidator, Reply, ok, refused};
use crate::store::Token;
use crate::store::scratch::ScratchDir;

const GOOD: &str = r#"{"token_type":"workspace","workspace_id":"w1","status":"active"}"#;

struct Rig {
    validator: FakeValidator,
    auth: ProxyTokenAuth,
    store: Store,
    clock: FakeClock,
    _dir: ScratchDir,
}

async fn rig() -> Rig {
    let validator = FakeValidator::start().await;
    let dir = ScratchDir::new();
    let store = Store::open(dir.path()).unwrap();
    let counters = Arc::new(TokenCounters::default());
    let clock = FakeClock::at(1_000_000);
    let upstream = Some(validator.client(&counters)).into();
    let auth = ProxyTokenAuth::new(store.clone(), upstream, validator.config().into(), clock.clock(), counters);
    Rig { validator, auth, store, clock, _dir: dir }
}

impl Rig {
    /// A rig whose validator knows `token`, which has been shown once.
    async fn with_known(token: &str) -> Self {
        let rig = rig().await;
        rig.validator.replies(ok(GOOD));
        rig.auth.principal(token).await.unwrap();
        rig
    }

    async fn own_token(&self, token: &str, expires_in: Option<u64>) -> TokenId {
        let id = TokenId::new(&format!("tok_{}", &token[4..16])).unwrap();
        let row = Token {
            id: id.clone(),
            workspace: WorkspaceId::new("mine").unwrap(),
            user: None,
            read_only: true,
            created_at: self.clock.now(),
            expires_at: expires_in.map(|secs| self.clock.now() + Duration::from_secs(secs)),
        };
        self.store.create_token(row, Sha256::digest(token).into()).await.unwrap();
        id
    }

    fn counts(&self) -> crate::auth::TokenCounts {
        self.auth.0.counters.snapshot()
    }
}

fn own(letter: &str) -> String {
    format!("egw_{}", letter.repeat(43))
}

/// Moves the monotonic clock while nothing is under way, so that no socket timeout is met by accident.
async fn pass(secs: u64) {
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(secs)).await;
    tokio::time::resume();
}

#[tokio::test]
async fn the_validator_is_asked_as_the_service_expects() {
    let rig = rig().await;
    rig.validator.replies(ok(r#"{"workspace_id":"w1","user_id":"ann"}"#));
    let principal = rig.auth.principal("opaque").await.unwrap();
    assert_eq!((principal.workspace().as_str(), principal.user().unwrap().as_str()), ("w1", "ann"));
    assert!(
        matches!(principal.credential(), CredentialId::Digest(digest) if digest[..] == Sha256::digest("opaque")[..])
    );
    let (path, secret, body) = rig.validator.last_question();
    assert_eq!(path, "/internal/validate-proxy-token");
    assert_eq!(secret.as_deref(), Some("between-us"));
    assert_eq!(body, serde_json::json!({"proxy_token": "opaque"}));
}

#[tokio::test]
async fn a_good_token_is_believed_for_five_minutes() {
    let rig = Rig::with_known("t").await;
    pass(299).await;
    rig.auth.principal("t").await.unwrap();
    assert_eq!(rig.validator.asked(), 1);
    pass(1).await;
    rig.auth.principal("t").await.unwrap();
    assert_eq!(rig.validator.asked(), 2);
    assert_eq!((rig.counts().hits, rig.counts().misses), (1, 2));
}

#[tokio::test]
async fn a_refused_token_is_refused_for_thirty_seconds() {
    let rig = rig().await;
    for _ in 0..3 {
        assert!(matches!(rig.auth.principal("t").await, Err(AuthError::Invalid)));
    }
    assert_eq!((rig.validator.asked(), rig.counts().negative_hits), (1, 2));
    rig.validator.replies(ok(GOOD));
    pass(30).await;
    rig.auth.principal("t").await.unwrap();
}

#[tokio::test]
async fn a_thousand_first_callers_make_one_request() {
    let rig = rig().await;
    rig.validator.replies(ok(GOOD));
    rig.validator.hold();
    let callers = future::join_all((0..1000).map(|_| rig.auth.principal("t")));
    let release = async {
        rig.validator.asked_at_least(1).await;
        rig.validator.release();
    };
    let (answers, ()) = tokio::join!(callers, release);
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(rig.validator.asked(), 1);
}

#[tokio::test]
async fn a_first_caller_that_leaves_takes_nobody_with_it() {
    let rig = rig().await;
    rig.validator.replies(ok(GOOD));
    rig.validator.hold();
    let first = {
        let auth = rig.auth.clone();
        tokio::spawn(async move { auth.principal("t").await })
    };
    rig.validator.asked_at_least(1).await;
    let mut second = Box::pin(rig.auth.principal("t"));
    assert!(futures_util::poll!(&mut second).is_pending());
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    rig.validator.release();
    second.await.unwrap();
    assert_eq!(rig.validator.asked(), 1);
}

#[tokio::test]
async fn a_token_whose_only_caller_left_is_known_to_the_next() {
    let rig = rig().await;
    rig.validator.replies(ok(GOOD));
    rig.validator.hold();
    let mut only = Box::pin(rig.auth.principal("t"));
    assert!(futures_util::poll!(&mut only).is_pending());
    rig.validator.asked_at_least(1).await;
    drop(only);
    rig.validator.release();
    rig.auth.principal("t").await.unwrap();
    assert_eq!(rig.validator.asked(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_junk_tokens_evict_no_good_one() {
    let rig = rig().await;
    rig.validator.decides(|_, question| match question["proxy_token"].as_str() {
        Some(token) if token.starts_with("good") => ok(GOOD),
        _ => refused(),
    });
    for number in 0..100 {
        rig.auth.principal(&format!("good {number}")).await.unwrap();
    }
    let junk = stream::iter(0..100_000).map(|number| {
        let auth = rig.auth.clone();
        tokio::spawn(async move { auth.principal(&format!("junk {number}")).await.is_err() })
    });
    let refusals = junk.buffer_unordered(64).filter(|refused| future::ready(*refused.as_ref().unwrap())).count().await;
    assert_eq!(refusals, 100_000);
    let asked = rig.validator.asked();
    for number in 0..100 {
        rig.auth.principal(&format!("good {number}")).await.unwrap();
    }
    assert_eq!(rig.validator.asked(), asked);
    assert_eq!(rig.counts().positive_evictions, 0);
    assert!(rig.counts().negative_evictions > 80_000);
}

/// Every way for the validator to fail, but for silence.
fn failures() -> Vec<Reply> {
    let mut failures: Vec<_> = [
        "",
        "garbage",
        "[]",
        "{}",
        r#"{"workspace_id":""}"#,
        r#"{"workspace_id":null,"user_id":"u"}"#,
        r#"{"workspace_id":7}"#,
        r#"{"workspace_id":"no/workspace"}"#,
    ]
    .map(ok)
    .to_vec();
    failures.extend([204, 302, 400, 403, 404, 429, 500, 503].map(|status| Reply::Answer(status, GOOD.into())));
    failures.push(ok(&format!(r#"{{"workspace_id":"w1","pad":"{}"}}"#, "x".repeat(70_000))));
    failures
}

#[tokio::test]
async fn a_failing_validator_refuses_nobody_and_is_not_remembered() {
    let rig = rig().await;
    for reply in failures() {
        rig.validator.replies(reply);
        let error = rig.auth.principal("t").await.unwrap_err();
        assert!(matches!(error, AuthError::Unavailable { .. }), "{error:?}");
        assert!(!format!("{error} {error:?}").contains(&rig.validator.url));
    }
    assert_eq!(rig.counts().upstream_failures, rig.validator.asked());
    rig.validator.replies(ok(GOOD));
    rig.auth.principal("t").await.unwrap();
}

#[tokio::test]
async fn a_token_once_good_outlives_failures_for_ten_minutes_since_it_was_confirmed() {
    let rig = Rig::with_known("t").await;
    pass(300).await;
    for (number, reply) in failures().into_iter().enumerate() {
        rig.validator.replies(reply);
        assert_eq!(rig.auth.principal("t").await.unwrap().workspace().as_str(), "w1");
        assert_eq!(rig.counts().stale, number as u64 + 1);
        pass(2).await;
    }
    pass(300).await;
    assert!(matches!(rig.auth.principal("t").await, Err(AuthError::Unavailable { .. })));
}

#[tokio::test]
async fn a_validator_that_just_failed_is_spared_for_a_second() {
    let rig = Rig::with_known("t").await;
    rig.validator.replies(Reply::Answer(500, String::new()));
    pass(300).await;
    for _ in 0..10 {
        rig.auth.principal("t").await.unwrap();
    }
    assert_eq!((rig.validator.asked(), rig.counts().stale), (2, 10));
    rig.validator.replies(refused());
    pass(1).await;
    assert!(matches!(rig.auth.principal("t").await, Err(AuthError::Invalid)));
    assert!(matches!(rig.auth.principal("t").await, Err(AuthError::Invalid)));
    assert_eq!(rig.validator.asked(), 3);
}

#[tokio::test]
async fn a_silent_validator_makes_a_token_unavailable_and_a_known_one_stale() {
    let rig = Rig::with_known("known").await;
    pass(300).await;
    rig.validator.replies(Reply::Never);
    for (token, asked) in [("unknown", 2), ("known", 3)] {
        let call = rig.auth.principal(token);
        let silence = async {
            rig.validator.asked_at_least(asked).await;
            // From here on the paused clock runs to the next deadline whenever nothing else can happen.
            tokio::time::pause();
        };
        let (answer, ()) = tokio::join!(call, silence);
        tokio::time::resume();
        match token {
            "known" => assert!(answer.is_ok()),
            _ => assert!(matches!(answer, Err(AuthError::Unavailable { .. }))),
        }
    }
    assert_eq!(rig.counts().stale, 1);
}

#[tokio::test]
async fn an_unreachable_validator_is_unavailable() {
    let rig = rig().await;
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let config = rig.validator.config();
    let upstream = Upstream::new(&url, &config, Arc::default(), Arc::default()).unwrap();
    let auth = ProxyTokenAuth::new(
        rig.store.clone(),
        Some(upstream).into(),
        config.into(),
        rig.clock.clock(),
        Arc::new(TokenCounters::default()),
    );
    assert!(matches!(auth.principal("t").await, Err(AuthError::Unavailable { .. })));
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let rig = rig().await;
    let elsewhere = FakeValidator::start().await;
    elsewhere.replies(ok(GOOD));
    rig.validator.replies(Reply::Redirect(format!("{}/internal/validate-proxy-token", elsewhere.url)));
    assert!(matches!(rig.auth.principal("t").await, Err(AuthError::Unavailable { .. })));
    assert_eq!(elsewhere.asked(), 0);
}

#[tokio::test]
async fn own_tokens_are_checked_here_even_with_a_validator() {
    let rig = rig().await;
    let token = own("a");
    let id = rig.own_token(&token, None).await;
    let principal = rig.auth.principal(&token).await.unwrap();
    assert_eq!(principal.workspace().as_str(), "mine");
    assert_eq!(principal.credential(), &CredentialId::Token(id));
    assert!(principal.scopes().read_only);
    assert!(matches!(rig.auth.principal(&own("b")).await, Err(AuthError::Invalid)));
    assert_eq!(rig.validator.asked(), 0);
}

#[tokio::test]
async fn without_a_validator_foreign_tokens_are_invalid() {
    let dir = ScratchDir::new();
    let store = Store::open(dir.path()).unwrap();
    let auth = ProxyTokenAuth::new(store, None.into(), config::Auth::default().into(), Clock::system(), Arc::default());
    for token in ["x", "egw_", "egw_short", &own("!")] {
        assert!(matches!(auth.principal(token).await, Err(AuthError::Invalid)), "{token:?}");
    }
}

#[tokio::test]
async fn a_cached_token_never_outlives_its_own_end() {
    let rig = rig().await;
    let token = own("a");
    rig.own_token(&token, Some(60)).await;
    rig.auth.principal(&token).await.unwrap();
    rig.clock.advance(59);
    rig.auth.principal(&token).await.unwrap();
    rig.clock.advance(1);
    assert!(matches!(rig.auth.principal(&token).await, Err(AuthError::Expired)));
    rig.auth.forget_all();
    assert!(matches!(rig.auth.principal(&token).await, Err(AuthError::Expired)));
}

#[tokio::test]
async fn a_revoked_token_ends_at_once_and_the_others_stay_known() {
    let rig = rig().await;
    let (revoked, kept) = (own("a"), own("b"));
    let id = rig.own_token(&revoked, None).await;
    rig.own_token(&kept, None).await;
    rig.auth.principal(&revoked).await.unwrap();
    rig.auth.principal(&kept).await.unwrap();
    rig.store.revoke_token(&id).await.unwrap();
    rig.auth.forget(&id);
    assert!(matches!(rig.auth.principal(&revoked).await, Err(AuthError::Invalid)));
    rig.auth.principal(&kept).await.unwrap();
    assert_eq!(rig.counts().hits, 1);
}

#[tokio::test]
async fn a_revocation_wins_over_a_check_under_way() {
    let rig = rig().await;
    rig.validator.decides(|number, _| if number == 1 { ok(GOOD) } else { refused() });
    rig.validator.hold();
    let revoke = async {
        rig.validator.asked_at_least(1).await;
        rig.auth.forget_all();
        rig.validator.release();
    };
    let (answer, ()) = tokio::join!(rig.auth.principal("t"), revoke);
    assert!(matches!(answer, Err(AuthError::Invalid)));
    assert!(matches!(rig.auth.principal("t").await, Err(AuthError::Invalid)));
    assert_eq!(rig.validator.asked(), 2);
}

#[tokio::test]
async fn a_revoked_own_token_does_not_make_foreign_ones_be_asked_again() {
    let rig = rig().await;
    rig.validator.replies(ok(GOOD));
    rig.validator.hold();
    let revoke = async {
        rig.validator.asked_at_least(1).await;
        rig.auth.forget(&TokenId::new("tok_x").unwrap());
        rig.validator.release();
    };
    let (answer, ()) = tokio::join!(rig.auth.principal("t"), revoke);
    answer.unwrap();
    assert_eq!(rig.validator.asked(), 1);
}

#[tokio::test]
async fn past_the_bound_of_checks_under_way_a_token_is_unavailable_and_own_ones_still_work() {
    let rig = rig().await;
    rig.validator.hold();
    let mut waiting: Vec<_> = (0..FLIGHTS_MAX)
        .map(|number| {
            let auth = rig.auth.clone();
            Box::pin(async move { auth.principal(&format!("junk {number}")).await })
        })
        .collect();
    for call in &mut waiting {
        assert!(futures_util::poll!(call).is_pending());
    }
    assert!(matches!(rig.auth.principal("t").await, Err(AuthError::Unavailable { .. })));
    let token = own("a");
    rig.own_token(&token, None).await;
    rig.auth.principal(&token).await.unwrap();
    rig.validator.asked_at_least(64).await;
    rig.validator.release();
    assert!(future::join_all(waiting).await.iter().all(|answer| matches!(answer, Err(AuthError::Invalid))));
}
