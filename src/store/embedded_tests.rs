//! The rules of the store, asked through its handle.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::store::path_in;
use crate::store::scratch::ScratchDir;

fn open() -> (ScratchDir, Store) {
    let dir = ScratchDir::new();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

fn workspace(text: &str) -> WorkspaceId {
    WorkspaceId::new(text).unwrap()
}

fn named(text: &str) -> EnvironmentName {
    EnvironmentName::new(text).unwrap()
}

fn at(secs: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(secs)
}

fn registration(id: &str, executor: &ExecutorId, key: u8) -> Registration {
    Registration {
        id: RegistrationId::new(id).unwrap(),
        executor: executor.clone(),
        transport: Transport::Noise,
        public_key: vec![key; 1216],
        credential: [key; 32],
        created_at: at(1),
    }
}

fn token(id: &str) -> Token {
    Token {
        id: TokenId::new(id).unwrap(),
        workspace: workspace("a"),
        user: Some(UserId::new("Ana").unwrap()),
        read_only: true,
        created_at: at(10),
        expires_at: Some(at(20)),
    }
}

fn revoked_turn(turn: &str, revoked_at: u64, forget_at: u64) -> Revocation {
    let scope = RevocationScope::Turn(TurnId::new(turn).unwrap());
    Revocation { scope, revoked_at: at(revoked_at), forget_at: at(forget_at) }
}

fn names(bindings: &[Binding]) -> Vec<&str> {
    bindings.iter().map(|binding| binding.name().as_str()).collect()
}

fn default_name(bindings: &[Binding]) -> Vec<&str> {
    bindings.iter().filter(|binding| binding.is_default()).map(|binding| binding.name().as_str()).collect()
}

#[tokio::test]
async fn an_executor_is_made_together_with_its_binding() {
    let (_dir, store) = open();
    let user = UserId::new("Ana").unwrap();
    let made = store.create_executor(&workspace("a"), &named("box"), true, Some(&user)).await.unwrap();
    assert!(made.id.as_str().starts_with("exe_") && made.id.as_str().len() == 40);
    assert_eq!(store.executor(&made.id).await.unwrap(), Some(made.clone()));
    let binding = store.binding(&workspace("a"), &made.id).await.unwrap().unwrap();
    assert_eq!((binding.workspace(), binding.executor()), (&workspace("a"), &made.id));
    assert_eq!((binding.name().as_str(), binding.is_default(), binding.description()), ("box", true, ""));
}

#[tokio::test]
async fn a_taken_name_makes_neither_executor_nor_binding_and_moves_no_default() {
    let (_dir, store) = open();
    let first = store.create_executor(&workspace("a"), &named("box"), false, None).await.unwrap();
    store.create_executor(&workspace("a"), &named("main"), true, None).await.unwrap();
    let refused = store.create_executor(&workspace("a"), &named("box"), true, None).await.unwrap_err();
    assert!(matches!(refused, StoreError::Conflict(_)));
    assert_eq!(refused.to_string(), "workspace a has another executor named box");
    let listed = store.executors(None).await.unwrap();
    assert_eq!((listed.len(), &listed[0].0.id), (2, &first.id));
    assert_eq!(default_name(&store.bindings(&workspace("a")).await.unwrap()), ["main"]);
}

#[tokio::test]
async fn a_workspace_has_one_default_which_moves() {
    let (_dir, store) = open();
    let first = store.create_executor(&workspace("a"), &named("one"), true, None).await.unwrap();
    let second = store.create_executor(&workspace("a"), &named("two"), true, None).await.unwrap();
    store.create_executor(&workspace("b"), &named("theirs"), true, None).await.unwrap();
    assert_eq!(default_name(&store.bindings(&workspace("a")).await.unwrap()), ["two"]);
    assert!(store.bind(&first.id, &workspace("a"), &named("one"), true).await.unwrap().is_default());
    assert_eq!(default_name(&store.bindings(&workspace("a")).await.unwrap()), ["one"]);
    assert_eq!(default_name(&store.bindings(&workspace("b")).await.unwrap()), ["theirs"]);
    // Binding again without asking for the default leaves it where it is.
    assert!(store.bind(&first.id, &workspace("a"), &named("uno"), false).await.unwrap().is_default());
    assert!(!store.bind(&second.id, &workspace("a"), &named("two"), false).await.unwrap().is_default());
}

#[tokio::test]
async fn binding_again_renames_and_keeps_the_place_in_the_list() {
    let (_dir, store) = open();
    let first = store.create_executor(&workspace("a"), &named("one"), false, None).await.unwrap();
    store.create_executor(&workspace("a"), &named("two"), false, None).await.unwrap();
    store.bind(&first.id, &workspace("a"), &named("uno"), false).await.unwrap();
    assert_eq!(names(&store.bindings(&workspace("a")).await.unwrap()), ["uno", "two"]);
    let refused = store.bind(&first.id, &workspace("a"), &named("two"), false).await.unwrap_err();
    assert!(matches!(refused, StoreError::Conflict(_)));
    store.bind(&first.id, &workspace("b"), &named("two"), false).await.unwrap();
    assert_eq!(names(&store.bindings(&workspace("b")).await.unwrap()), ["two"]);
}

#[tokio::test]
async fn renaming_keeps_names_unique_and_the_default() {
    let (_dir, store) = open();
    let first = store.create_executor(&workspace("a"), &named("one"), true, None).await.unwrap();
    store.create_executor(&workspace("a"), &named("two"), false, None).await.unwrap();
    let refused = store.rename(&first.id, &workspace("a"), &named("two")).await.unwrap_err();
    assert!(matches!(refused, StoreError::Conflict(_)));
    store.rename(&first.id, &workspace("a"), &named("uno")).await.unwrap();
    let bindings = store.bindings(&workspace("a")).await.unwrap();
    assert_eq!((names(&bindings), default_name(&bindings)), (vec!["uno", "two"], vec!["uno"]));
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let (_dir, store) = open();
    let (a, box_) = (workspace("a"), named("box"));
    let ghost = ExecutorId::new("exe_ghost").unwrap();
    let mine = store.create_executor(&workspace("b"), &box_, false, None).await.unwrap().id;
    let answers = [
        store.bind(&ghost, &a, &box_, false).await.map(drop),
        store.unbind(&mine, &a).await,
        store.rename(&mine, &a, &box_).await,
        store.delete_executor(&ghost).await,
        store.revoke_token(&TokenId::new("tok_x").unwrap()).await,
        store.save_registration(registration("exr_1", &ghost, 1), 8).await,
    ];
    for answer in answers {
        assert!(matches!(answer, Err(StoreError::NotFound(_))), "{answer:?}");
    }
    assert_eq!(store.executor(&ghost).await.unwrap(), None);
    assert_eq!(store.binding(&a, &mine).await.unwrap(), None);
}

#[tokio::test]
async fn unbinding_takes_an_executor_from_one_workspace_only() {
    let (_dir, store) = open();
    let executor = store.create_executor(&workspace("a"), &named("box"), false, None).await.unwrap().id;
    store.bind(&executor, &workspace("b"), &named("shared"), false).await.unwrap();
    store.unbind(&executor, &workspace("a")).await.unwrap();
    assert_eq!(store.binding(&workspace("a"), &executor).await.unwrap(), None);
    assert!(store.binding(&workspace("b"), &executor).await.unwrap().is_some());
}

#[tokio::test]
async fn a_list_for_one_workspace_shows_nothing_of_another() {
    let (_dir, store) = open();
    let shared = store.create_executor(&workspace("a"), &named("shared"), false, None).await.unwrap().id;
    store.create_executor(&workspace("b"), &named("theirs"), false, None).await.unwrap();
    store.bind(&shared, &workspace("b"), &named("guest"), false).await.unwrap();
    let of_a = store.executors(Some(&workspace("a"))).await.unwrap();
    assert_eq!((of_a.len(), names(&of_a[0].1)), (1, vec!["shared"]));
    let everything = store.executors(None).await.unwrap();
    assert_eq!((everything.len(), names(&everything[0].1)), (2, vec!["shared", "guest"]));
}

#[tokio::test]
async fn a_deleted_executor_takes_bindings_and_registrations_along() {
    let (_dir, store) = open();
    let executor = store.create_executor(&workspace("a"), &named("box"), true, None).await.unwrap().id;
    store.save_registration(registration("exr_1", &executor, 1), 8).await.unwrap();
    store.delete_executor(&executor).await.unwrap();
    assert_eq!(store.executor(&executor).await.unwrap(), None);
    assert_eq!(store.bindings(&workspace("a")).await.unwrap(), []);
    assert_eq!(store.registration(&RegistrationId::new("exr_1").unwrap()).await.unwrap(), None);
    store.create_executor(&workspace("a"), &named("box"), true, None).await.unwrap();
}

#[tokio::test]
async fn last_seen_moves_forward_only_and_skips_executors_that_are_gone() {
    let (_dir, store) = open();
    let executor = store.create_executor(&workspace("a"), &named("box"), false, None).await.unwrap().id;
    let ghost = ExecutorId::new("exe_ghost").unwrap();
    store.touch_executors(vec![(ghost, at(5)), (executor.clone(), at(7))]).await.unwrap();
    store.touch_executors(vec![(executor.clone(), at(6))]).await.unwrap();
    assert_eq!(store.executor(&executor).await.unwrap().unwrap().last_seen, Some(at(7)));
}

#[tokio::test]
async fn only_the_newest_registrations_of_each_executor_are_kept() {
    let (_dir, store) = open();
    let first = store.create_executor(&workspace("a"), &named("one"), false, None).await.unwrap().id;
    let second = store.create_executor(&workspace("a"), &named("two"), false, None).await.unwrap().id;
    store.save_registration(registration("exr_other", &second, 9), 2).await.unwrap();
    for id in ["exr_1", "exr_2", "exr_1", "exr_3"] {
        store.save_registration(registration(id, &first, 1), 2).await.unwrap();
    }
    let kept = store.registrations(&first).await.unwrap();
    let ids: Vec<_> = kept.iter().map(|registration| registration.id.as_str()).collect();
    assert_eq!(ids, ["exr_3", "exr_1"]);
    assert_eq!(store.registrations(&second).await.unwrap().len(), 1);
    store.save_registration(registration("exr_4", &first, 1), 0).await.unwrap();
    assert_eq!(store.registrations(&first).await.unwrap(), [registration("exr_4", &first, 1)]);
}

#[tokio::test]
async fn a_registration_is_found_by_the_key_of_its_own_executor() {
    let (_dir, store) = open();
    let first = store.create_executor(&workspace("a"), &named("one"), false, None).await.unwrap().id;
    let second = store.create_executor(&workspace("a"), &named("two"), false, None).await.unwrap().id;
    let keyless = Registration { public_key: vec![], transport: Transport::Direct, ..registration("exr_2", &first, 2) };
    store.save_registration(registration("exr_1", &first, 1), 8).await.unwrap();
    store.save_registration(keyless.clone(), 8).await.unwrap();
    let by_key = async |executor, key: &[u8]| store.registration_by_key(executor, key).await.unwrap();
    assert_eq!(by_key(&first, &[1; 1216]).await, Some(registration("exr_1", &first, 1)));
    assert_eq!(by_key(&second, &[1; 1216]).await, None);
    assert_eq!(by_key(&first, &[]).await, None);
    assert_eq!(store.registration(&keyless.id).await.unwrap(), Some(keyless));
}

#[tokio::test]
async fn a_registration_id_never_passes_to_another_executor() {
    let (_dir, store) = open();
    let first = store.create_executor(&workspace("a"), &named("one"), false, None).await.unwrap().id;
    let second = store.create_executor(&workspace("a"), &named("two"), false, None).await.unwrap().id;
    store.save_registration(registration("exr_1", &first, 1), 8).await.unwrap();
    let refused = store.save_registration(registration("exr_1", &second, 2), 8).await.unwrap_err();
    assert!(matches!(refused, StoreError::Conflict(_)));
    assert_eq!(store.registrations(&first).await.unwrap(), [registration("exr_1", &first, 1)]);
}

#[tokio::test]
async fn every_transport_is_read_back_as_stored() {
    let (_dir, store) = open();
    let executor = store.create_executor(&workspace("a"), &named("box"), false, None).await.unwrap().id;
    for transport in TRANSPORTS {
        let saved = Registration { transport, ..registration("exr_1", &executor, 1) };
        store.save_registration(saved.clone(), 1).await.unwrap();
        assert_eq!(store.registrations(&executor).await.unwrap(), [saved]);
    }
}

#[tokio::test]
async fn a_token_opens_by_its_digest_until_it_is_revoked() {
    let (_dir, store) = open();
    let endless = Token { expires_at: None, user: None, read_only: false, ..token("tok_2") };
    store.create_token(token("tok_1"), [1; 32]).await.unwrap();
    store.create_token(endless.clone(), [2; 32]).await.unwrap();
    assert_eq!(store.token_by_digest([1; 32]).await.unwrap(), Some(token("tok_1")));
    assert_eq!(store.token_by_digest([3; 32]).await.unwrap(), None);
    let refused = store.create_token(token("tok_3"), [1; 32]).await.unwrap_err();
    assert!(matches!(refused, StoreError::Conflict(_)));
    store.revoke_token(&token("tok_1").id).await.unwrap();
    assert_eq!(store.token_by_digest([1; 32]).await.unwrap(), None);
    assert_eq!(store.tokens().await.unwrap(), [endless]);
}

#[tokio::test]
async fn a_live_revocation_is_never_dropped_for_a_new_one() {
    let (_dir, store) = open();
    store.add_revocation(revoked_turn("t1", 1, 100), 2).await.unwrap();
    store.add_revocation(revoked_turn("t2", 2, 50), 2).await.unwrap();
    let refused = store.add_revocation(revoked_turn("t3", 3, 100), 2).await.unwrap_err();
    assert_eq!(refused.to_string(), "2 revocations are live, and no more are kept");
    assert_eq!(store.revocations().await.unwrap(), [revoked_turn("t1", 1, 100), revoked_turn("t2", 2, 50)]);
    // Revoking again what is revoked takes no further place, and an ended one gives its place away.
    store.add_revocation(revoked_turn("t1", 4, 90), 2).await.unwrap();
    store.add_revocation(revoked_turn("t3", 60, 100), 2).await.unwrap();
    assert_eq!(store.revocations().await.unwrap(), [revoked_turn("t1", 4, 100), revoked_turn("t3", 60, 100)]);
    assert_eq!(store.forget_revocations(at(99)).await.unwrap(), 0);
    assert_eq!(store.forget_revocations(at(100)).await.unwrap(), 2);
}

#[tokio::test]
async fn a_turn_and_a_workspace_of_one_name_are_revoked_apart() {
    let (_dir, store) = open();
    let turn = revoked_turn("same", 1, 9);
    let whole = Revocation { scope: RevocationScope::Workspace(workspace("same")), ..revoked_turn("same", 2, 9) };
    store.add_revocation(turn.clone(), 9).await.unwrap();
    store.add_revocation(whole.clone(), 9).await.unwrap();
    assert_eq!(store.revocations().await.unwrap(), [turn, whole]);
}

#[tokio::test]
async fn a_rotated_key_verifies_once_more_and_purposes_share_nothing() {
    let (_dir, store) = open();
    let first = store.keyring(KeyPurpose::CapToken).await.unwrap();
    assert!(first.previous.is_none());
    assert_eq!((first.current.kid.len(), first.current.secret.len()), (8, KEY_BYTES));
    let ticket = store.keyring(KeyPurpose::Ticket).await.unwrap();
    assert_ne!(first.current.secret, ticket.current.secret);

    let second = store.rotate_key(KeyPurpose::CapToken).await.unwrap();
    assert_eq!(second.previous.unwrap().secret, first.current.secret);
    let third = store.rotate_key(KeyPurpose::CapToken).await.unwrap();
    let stored = store.keyring(KeyPurpose::CapToken).await.unwrap();
    assert_eq!(stored.current.secret, third.current.secret);
    assert_eq!(stored.previous.unwrap().secret, second.current.secret);
    assert_eq!(store.keyring(KeyPurpose::Ticket).await.unwrap().current.secret, ticket.current.secret);
}

#[tokio::test]
async fn callers_at_once_agree_on_the_first_key() {
    let (_dir, store) = open();
    let asked = (0..16).map(|_| store.keyring(KeyPurpose::Harness));
    let keyrings = futures_util::future::try_join_all(asked).await.unwrap();
    assert!(keyrings.iter().all(|keyring| keyring.current.secret == keyrings[0].current.secret));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_want_one_name_at_once_one_gets_it() {
    let (_dir, store) = open();
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..64 {
        let store = store.clone();
        let name = named(&format!("box-{}", i % 8));
        tasks.spawn(async move { store.create_executor(&workspace("a"), &name, true, None).await });
    }
    let made = tasks.join_all().await.into_iter().filter(Result::is_ok).count();
    assert_eq!(made, 8);
    let bindings = store.bindings(&workspace("a")).await.unwrap();
    assert_eq!((bindings.len(), default_name(&bindings).len()), (8, 1));
}

#[tokio::test]
async fn everything_is_there_when_the_store_is_opened_again() {
    let (dir, store) = open();
    let executor = store.create_executor(&workspace("a"), &named("box"), true, None).await.unwrap();
    store.save_registration(registration("exr_1", &executor.id, 1), 8).await.unwrap();
    store.create_token(token("tok_1"), [1; 32]).await.unwrap();
    store.add_revocation(revoked_turn("t1", 1, 9), 9).await.unwrap();
    let key = store.keyring(KeyPurpose::Executor).await.unwrap().current;
    let bindings = store.bindings(&workspace("a")).await.unwrap();

    // The first store is still open, as after kill -9: nothing was checkpointed or closed for the second.
    let again = Store::open(dir.path()).unwrap();
    assert_eq!(again.executor(&executor.id).await.unwrap(), Some(executor.clone()));
    assert_eq!(again.bindings(&workspace("a")).await.unwrap(), bindings);
    assert_eq!(again.registrations(&executor.id).await.unwrap(), [registration("exr_1", &executor.id, 1)]);
    assert_eq!(again.tokens().await.unwrap(), [token("tok_1")]);
    assert_eq!(again.revocations().await.unwrap(), [revoked_turn("t1", 1, 9)]);
    assert_eq!(again.keyring(KeyPurpose::Executor).await.unwrap().current.secret, key.secret);
}

#[tokio::test]
async fn a_locked_database_is_unavailable_and_recovers() {
    let (dir, store) = open();
    let other = Connection::open(path_in(dir.path())).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    assert!(matches!(store.health().await, Err(StoreError::Unavailable(_))));
    other.execute_batch("ROLLBACK").unwrap();
    store.health().await.unwrap();
}

#[tokio::test]
async fn a_write_that_fails_half_way_leaves_nothing() {
    let (_dir, store) = open();
    let failed = store.write(|tx| {
        tx.execute("INSERT INTO probe VALUES (1, 1)", [])?;
        Err::<(), _>(StoreError::Conflict("second half".into()))
    });
    assert!(matches!(failed.await, Err(StoreError::Conflict(_))));
    assert_eq!(store.read(|db| one(db, "SELECT 1 FROM probe", [], |_| Ok(()))).await.unwrap(), None);
}

#[tokio::test]
async fn a_panic_costs_its_own_question_only() {
    let (_dir, store) = open();
    let panicked = store.write(|tx| -> Result<(), _> {
        tx.execute("INSERT INTO probe VALUES (1, 1)", [])?;
        panic!("on purpose")
    });
    assert!(matches!(panicked.await, Err(StoreError::Unavailable(_))));
    assert_eq!(store.read(|db| one(db, "SELECT 1 FROM probe", [], |_| Ok(()))).await.unwrap(), None);
    store.health().await.unwrap();
}

#[tokio::test]
async fn a_queued_write_happens_although_its_caller_left_and_no_handle_remains() {
    let (dir, store) = open();
    let (open_gate, gate) = std::sync::mpsc::channel::<()>();
    let (ended, thread_ended) = oneshot::channel::<()>();
    // The thread stands in this question until the gate opens, and drops `ended` when it has gone on.
    let busy = store.ask(move |_| {
        gate.recv().unwrap();
        Ok(())
    });
    let late = store.health();
    let last = store.ask(move |_| {
        drop(ended);
        Ok(())
    });
    // One poll each puts them into the queue; then their callers leave.
    {
        let mut questions = Box::pin(futures_util::future::join3(busy, late, last));
        assert!(futures_util::poll!(&mut questions).is_pending());
    }
    drop(store);
    open_gate.send(()).unwrap();
    assert!(thread_ended.await.is_err());
    let again = Store::open(dir.path()).unwrap();
    let writes = again.read(|db| one(db, "SELECT writes FROM probe", [], |row| row.get::<_, i64>(0))).await.unwrap();
    assert_eq!(writes, Some(1));
}

#[test]
fn times_survive_storing_on_both_sides_of_the_epoch() {
    for moment in [UNIX_EPOCH, now(), UNIX_EPOCH - Duration::from_nanos(1), at(4_102_444_800)] {
        assert_eq!(time(nanos(moment)), moment);
    }
    assert_eq!(nanos(at(1 << 50)), i64::MAX);
}
