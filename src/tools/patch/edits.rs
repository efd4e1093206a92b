//! Random edits and the patches that say them, for tests: what a patch makes of a file is compared with the edit, and
//! with what git and patch make of it.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::apply::apply;
use super::search::Work;
use super::{Action, Patch, normalise, plan};

/// One line of an edit, with its end.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Keep(String),
    Remove(String),
    Add(String),
}

/// From one text to another, line by line.
struct Edit(Vec<Step>);

/// Numbers that look random and are the same for the same seed (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }
}

impl Edit {
    /// Some lines go, some come, some are replaced, in a few places.
    fn random(source: &str, dice: &mut Dice) -> Self {
        let lines: Vec<&str> = source.split_inclusive('\n').collect();
        let end = if source.contains("\r\n") { "\r\n" } else { "\n" };
        let mut places: Vec<usize> = (0..1 + dice.below(4)).map(|_| dice.below(lines.len() + 1)).collect();
        places.sort_unstable();
        let (mut steps, mut at) = (Vec::new(), 0);
        for place in places {
            if place < at {
                continue;
            }
            steps.extend(lines[at..place].iter().map(|line| Step::Keep((*line).into())));
            let gone = dice.below(4).min(lines.len() - place);
            let come = if gone == 0 { 1 + dice.below(3) } else { dice.below(4) };
            steps.extend(lines[place..place + gone].iter().map(|line| Step::Remove((*line).into())));
            for _ in 0..come {
                // New lines look like old ones, so that many places are nearly alike.
                let like = lines.get(dice.below(lines.len().max(1))).map_or("", |line| line.trim_end());
                let line = if dice.one_in(2) { like.to_owned() } else { format!("{like}{}", dice.below(100)) };
                steps.push(Step::Add(line + end));
            }
            at = place + gone;
        }
        steps.extend(lines[at..].iter().map(|line| Step::Keep((*line).into())));
        Self(steps).ended(source.is_empty() || source.ends_with('\n'), end)
    }

    /// The shortest edit between two texts, by the table of their longest common subsequence.
    fn between(old: &str, new: &str) -> Self {
        let (old, new): (Vec<_>, Vec<_>) = (old.split_inclusive('\n').collect(), new.split_inclusive('\n').collect());
        let mut common = vec![vec![0; new.len() + 1]; old.len() + 1];
        for i in (0..old.len()).rev() {
            for j in (0..new.len()).rev() {
                let skip = common[i + 1][j].max(common[i][j + 1]);
                common[i][j] = if old[i] == new[j] { common[i + 1][j + 1] + 1 } else { skip };
            }
        }
        let (mut i, mut j, mut steps) = (0, 0, Vec::new());
        while i < old.len() || j < new.len() {
            if i < old.len() && j < new.len() && old[i] == new[j] {
                steps.push(Step::Keep(old[i].into()));
                (i, j) = (i + 1, j + 1);
            } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
                steps.push(Step::Remove(old[i].into()));
                i += 1;
            } else {
                steps.push(Step::Add(new[j].into()));
                j += 1;
            }
        }
        Self(steps)
    }

    /// With or without a newline at the end of the new text; within it every line has one.
    fn ended(mut self, newline: bool, line_end: &str) -> Self {
        let mut last = true;
        let mut steps = Vec::new();
        for step in self.0.drain(..).rev() {
            let end = |line: String| match (line.ends_with('\n'), last && !newline) {
                (true, true) => line.trim_end_matches(['\r', '\n']).to_owned(),
                (false, false) => line + line_end,
                _ => line,
            };
            match step {
                Step::Remove(line) => steps.push(Step::Remove(line)),
                Step::Add(line) => {
                    steps.push(Step::Add(end(line)));
                    last = false;
                }
                Step::Keep(line) => {
                    let changed = end(line.clone());
                    match changed == line {
                        true => steps.push(Step::Keep(line)),
                        false => steps.extend([Step::Add(changed), Step::Remove(line)]),
                    }
                    last = false;
                }
            }
        }
        steps.reverse();
        Self(steps)
    }

    fn new_text(&self) -> String {
        let new = |step: &Step| match step {
            Step::Keep(line) | Step::Add(line) => line.clone(),
            Step::Remove(_) => String::new(),
        };
        self.0.iter().map(new).collect()
    }

    /// The ranges of steps that stand together, with `context` lines around what changes.
    fn ranges(&self, context: usize) -> Vec<std::ops::Range<usize>> {
        let mut ranges: Vec<std::ops::Range<usize>> = Vec::new();
        for (at, step) in self.0.iter().enumerate() {
            if matches!(step, Step::Keep(_)) {
                continue;
            }
            let range = at.saturating_sub(context)..(at + 1 + context).min(self.0.len());
            match ranges.last_mut() {
                Some(last) if last.end >= range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// The hunks of a unified diff.
    fn unified(&self, context: usize) -> String {
        let mut text = String::new();
        for range in self.ranges(context) {
            let count = |steps: &[Step], without: fn(&Step) -> bool| steps.iter().filter(|step| !without(step)).count();
            let sides: [fn(&Step) -> bool; 2] =
                [|step| matches!(step, Step::Add(_)), |step| matches!(step, Step::Remove(_))];
            let [old, new] = sides.map(|without| {
                let count_before = count(&self.0[..range.start], without);
                let lines = count(&self.0[range.clone()], without);
                format!("{},{lines}", count_before + usize::from(lines > 0))
            });
            text += &format!("@@ -{old} +{new} @@\n");
            for step in &self.0[range] {
                let (tag, line) = match step {
                    Step::Keep(line) => (' ', line),
                    Step::Remove(line) => ('-', line),
                    Step::Add(line) => ('+', line),
                };
                text += &format!("{tag}{line}");
                if !line.ends_with('\n') {
                    text += "\n\\ No newline at end of file\n";
                }
            }
        }
        text
    }

    /// The hunks of codex's format, each with as much before it as it takes to be found at the right place first.
    fn codex(&self, context: usize) -> String {
        let old = |steps: &[Step]| -> Vec<String> {
            let old = steps.iter().filter(|step| !matches!(step, Step::Add(_)));
            old.map(|step| match step {
                Step::Keep(line) | Step::Remove(line) | Step::Add(line) => line.trim_end_matches(['\r', '\n']).into(),
            })
            .collect()
        };
        let mut text = String::new();
        let mut cursor = 0;
        for mut range in self.ranges(context) {
            let behind = old(&self.0[cursor..]);
            let at_end = range.end == self.0.len();
            loop {
                let (before, lines) = (old(&self.0[cursor..range.start]).len(), old(&self.0[range.clone()]));
                let first = behind.windows(lines.len().max(1)).position(|window| window == lines);
                if at_end || !lines.is_empty() && first == Some(before) || range.start == cursor {
                    break;
                }
                range.start -= 1;
            }
            text += "@@\n";
            for step in &self.0[range.clone()] {
                let (tag, line) = match step {
                    Step::Keep(line) => (' ', line),
                    Step::Remove(line) => ('-', line),
                    Step::Add(line) => ('+', line),
                };
                text += &format!("{tag}{}\n", line.trim_end_matches(['\r', '\n']));
            }
            if at_end {
                text += "*** End of File\n";
            }
            cursor = range.end;
        }
        text
    }
}

/// What the patch of one file makes of it.
pub(super) fn patched(source: &str, patch: String) -> Result<String, String> {
    let text = normalise(patch);
    let patch = Patch::parse(&text).map_err(|error| error.to_string())?;
    let [file] = &*patch.files else { panic!("the patch has {} sections", patch.files.len()) };
    let Action::Update { hunks, .. } = &file.action else { panic!("no update: {:?}", file.action) };
    let bytes = apply(source.as_bytes(), hunks, &mut Work::new()).map_err(|misfit| misfit.to_string())?;
    Ok(String::from_utf8(bytes).unwrap())
}

fn with_unified(source: &str, edit: &Edit, context: usize) -> Result<String, String> {
    patched(source, format!("--- a/file\n+++ b/file\n{}", edit.unified(context)))
}

fn with_codex(source: &str, edit: &Edit, context: usize) -> Result<String, String> {
    patched(source, format!("*** Begin Patch\n*** Update File: file\n{}*** End Patch\n", edit.codex(context)))
}

/// The source files of this repository: the same on every machine, so that a failure is one everywhere.
fn sources() -> Vec<String> {
    let mut files = Vec::new();
    let mut folders: Vec<_> =
        ["bin", "protocol", "src", "tests"].map(|folder| Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).into();
    while let Some(folder) = folders.pop() {
        for path in folder.read_dir().unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() && !path.ends_with("node_modules") {
                folders.push(path);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    let texts = files.into_iter().map(|path| fs::read_to_string(path).unwrap());
    texts.filter(|text| (1..=64 * 1024).contains(&text.len())).collect()
}

/// The sources in turn, now and then in the other form of line ends or without the last one.
fn random_edits(count: usize) -> impl Iterator<Item = (String, Edit, Dice)> {
    let sources = sources();
    (0..count).map(move |number| {
        let mut dice = Dice(0x9e37_79b9 + number as u64 * 0x1234_5677);
        dice.below(7);
        let mut source = sources[number % sources.len()].clone();
        if dice.one_in(6) {
            source = source.replace('\n', "\r\n");
        }
        if dice.one_in(6) {
            source.truncate(source.trim_end().len());
        }
        let edit = Edit::random(&source, &mut dice);
        (source, edit, dice)
    })
}

#[test]
fn five_hundred_random_edits_of_real_sources_apply_exactly_in_both_formats() {
    for (number, (source, edit, mut dice)) in random_edits(500).enumerate() {
        let new = edit.new_text();
        let unified = with_unified(&source, &edit, dice.below(4)).unwrap_or_else(|error| panic!("{number}: {error}"));
        assert!(unified == new, "{number}: the unified diff makes something else");
        let codex = with_codex(&source, &edit, 1 + dice.below(3)).unwrap_or_else(|error| panic!("{number}: {error}"));
        assert!(codex == new, "{number}: the patch makes something else");
        let lf = edit.unified(3).replace("\r\n", "\n");
        let lf = patched(&source, format!("--- a/file\n+++ b/file\n{lf}")).unwrap();
        assert!(lf == new, "{number}: line ends are not kept");
    }
}

/// A directory of this test alone, removed with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("exec-gateway-{name}-{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The files of a tree, with their contents and whether they can be run.
type Tree = BTreeMap<String, (Vec<u8>, bool)>;

fn write(root: &Path, tree: &Tree) {
    for (name, (content, executable)) in tree {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), content).unwrap();
        let mode = if *executable { 0o755 } else { 0o644 };
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
}

fn read(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap().map(|entry| entry.unwrap()) {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                folders.push(entry.path());
                continue;
            }
            let name = entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            tree.insert(name, (fs::read(entry.path()).unwrap(), metadata.permissions().mode() & 0o100 != 0));
        }
    }
    tree
}

/// Runs a program to its end, whatever that is, and returns what it printed.
fn run(folder: &Path, program: &str, arguments: &[&str], input: Option<&Path>) -> String {
    let mut command = Command::new(program);
    command
        .current_dir(folder)
        .args(arguments)
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .stderr(Stdio::null());
    command.env("HOME", folder).env("XDG_CONFIG_HOME", folder).env("GIT_CEILING_DIRECTORIES", folder);
    if let Some(input) = input {
        command.stdin(fs::File::open(input).unwrap());
    }
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

/// What the patch makes of a tree, or what is wrong with each section.
fn planned(text: &str, tree: &Tree) -> Result<Tree, Vec<(String, Option<String>)>> {
    let text = normalise(text.to_owned());
    let patch = Patch::parse(&text).unwrap();
    let before: HashMap<String, Vec<u8>> =
        tree.iter().map(|(name, (bytes, _))| (name.clone(), bytes.clone())).collect();
    let changes = plan(&patch, str::to_owned, &before, 1 << 30).map_err(|failures| {
        let names = patch.files.iter().map(|file| file.path.to_string());
        names.zip(failures.into_iter().map(|failure| failure.map(|failure| failure.to_string()))).collect::<Vec<_>>()
    })?;
    let mut after = tree.clone();
    for change in changes {
        let was = change.like.as_ref().unwrap_or(&change.path);
        let executable = change.executable.unwrap_or_else(|| tree.get(was).is_some_and(|(_, executable)| *executable));
        match change.content {
            Some(content) => drop(after.insert(change.path, (content, executable))),
            None => drop(after.remove(&change.path)),
        }
    }
    Ok(after)
}

/// Two trees: files edited, moved with an edit, made, removed, and made ones that can be run.
fn two_trees() -> [Tree; 2] {
    let (mut old, mut new) = (Tree::new(), Tree::new());
    for (number, (source, edit, mut dice)) in random_edits(500).enumerate() {
        let name = format!("{}/file {number}.rs", number % 7);
        let before = (source.into_bytes(), dice.one_in(5));
        let after = (edit.new_text().into_bytes(), before.1 != dice.one_in(10));
        match number % 20 {
            0 => drop(old.insert(name, before)),
            1 => drop(new.insert(name, after)),
            2 => {
                old.insert(name, before);
                new.insert(format!("moved/ü{number}.rs"), after);
            }
            _ => {
                old.insert(name.clone(), before);
                new.insert(name, after);
            }
        }
    }
    [old, new]
}

#[test]
fn the_diff_of_five_hundred_files_applies_as_git_applies_it() {
    let scratch = Scratch::new("git");
    let [old, new] = two_trees();
    let (repository, copy) = (scratch.0.join("repository"), scratch.0.join("copy"));
    write(&repository, &old);
    run(&repository, "git", &["init", "-q"], None);
    run(&repository, "git", &["add", "."], None);
    run(&repository, "git", &["-c", "user.name=a", "-c", "user.email=a@a", "commit", "-q", "-m", "old"], None);
    run(&repository, "git", &["rm", "-r", "-q", "."], None);
    write(&repository, &new);
    run(&repository, "git", &["add", "."], None);
    let diff = run(&repository, "git", &["diff", "--cached", "-M"], None);

    fs::write(scratch.0.join("diff"), &diff).unwrap();
    write(&copy, &old);
    run(&copy, "git", &["apply", "--whitespace=nowarn", "../diff"], None);

    assert!(diff.contains("\nrename from ") && diff.contains("\nnew mode ") && diff.contains("\nnew file mode "));
    assert!(read(&copy) == new, "git applies its own diff");
    assert!(planned(&diff, &old).unwrap() == new, "something else than git makes of it");
}

#[test]
fn files_that_have_changed_since_are_patched_as_patch_does_it() {
    let scratch = Scratch::new("patch");
    let [old, new] = two_trees();
    write(&scratch.0.join("a"), &old);
    write(&scratch.0.join("b"), &new);
    let diff = run(&scratch.0, "diff", &["-ruN", "a", "b"], None);
    fs::write(scratch.0.join("diff"), &diff).unwrap();

    // Elsewhere in each file somebody else has been at work.
    let mut since = old.clone();
    for (number, (content, _)) in since.values_mut().enumerate() {
        let mut dice = Dice(77 + number as u64 * 0x9876_5433);
        let source = String::from_utf8(content.clone()).unwrap();
        *content = Edit::random(&source, &mut dice).new_text().into_bytes();
    }
    for (name, before) in [("same", &old), ("since", &since)] {
        let folder = scratch.0.join(name);
        write(&folder, before);
        run(
            &folder,
            "patch",
            &["-p1", "-s", "-f", "--fuzz=0", "--no-backup-if-mismatch"],
            Some(&scratch.0.join("diff")),
        );
        let theirs = read(&folder);
        let rejected = theirs.keys().filter_map(|name| name.strip_suffix(".rej")).collect::<Vec<_>>();

        // Each section alone: all together they would be refused for one.
        let sections = diff.split("\ndiff -ruN ").map(|section| section.trim_start_matches("diff -ruN "));
        let mut same = 0;
        for section in sections {
            let file = section.lines().next().unwrap().rsplit_once("b/").unwrap().1.trim_matches(['\'', '"']);
            let Some(file) = (file.is_ascii()).then_some(file) else { continue };
            let one: Tree = before.get(file).map(|content| (file.to_owned(), content.clone())).into_iter().collect();
            let made = planned(section.split_once('\n').unwrap().1, &one);
            // What is left of a file that should be empty by now, patch leaves there; with git, and here, that is no
            // fit.
            if rejected.contains(&file) || name == "since" && section.contains(" +0,0 @@") {
                continue;
            }
            let made = made.unwrap_or_else(|error| panic!("patch applies this, and we do not: {error:?}"));
            let content = |tree: &Tree| tree.get(file).map(|(content, _)| content.clone());
            assert!(content(&made) == content(&theirs), "something else than patch makes of {file}");
            same += 1;
        }
        assert!(same > 200, "patch applies most, so that there is something to compare");
    }
}

proptest! {
    #[test]
    fn the_patch_between_two_texts_makes_one_of_the_other(
        old in "([ab]{0,2}\r?\n){0,12}[ab]?", new in "([ab]{0,2}\r?\n){0,12}[ab]?", context in 0usize..4,
    ) {
        let edit = Edit::between(&old, &new);
        prop_assume!(old != new);
        prop_assert_eq!(&edit.new_text(), &new);
        prop_assert_eq!(with_unified(&old, &edit, context).unwrap(), new);
    }

    #[test]
    fn a_patch_of_codex_keeps_line_ends_and_a_missing_last_newline(
        old in "([ab ]{0,3}\n){0,12}[ab]?", new in "([ab ]{0,3}\n){0,12}[ab]?", context in 1usize..4, crlf: bool,
    ) {
        let (old, new) = if crlf { (old.replace('\n', "\r\n"), new.replace('\n', "\r\n")) } else { (old, new) };
        prop_assume!(!new.is_empty());
        let ends = old.is_empty() || old.ends_with('\n');
        let edit = Edit::between(&old, &new).ended(ends, "\n");
        prop_assume!(edit.0.iter().any(|step| !matches!(step, Step::Keep(_))));
        let mut new = edit.new_text();
        if crlf && (old.is_empty() || !old.contains('\n')) {
            new = new.replace("\r\n", "\n");
        }
        prop_assert_eq!(with_codex(&old, &edit, context).unwrap().replace("\r\n", "\n"), new.replace("\r\n", "\n"));
        let lone = with_codex(&old, &edit, context).unwrap().replace("\r\n", "").contains('\n');
        prop_assert!(!lone || !crlf || !old.contains('\n'));
    }
}

/// Whatever is fed to it is read or refused, and applied or refused: nothing else.
#[test]
fn no_text_makes_the_reader_or_the_search_fail() {
    let files = ["", "a\nb\n", "a\r\nb", "fn a() {\n    b();\n}\n"];
    let before: HashMap<String, Vec<u8>> =
        files.iter().map(|text| (format!("f{}", text.len()), (*text).into())).collect();
    let corpus = [
        "*** Begin Patch\n*** Add File: f1\n+a\n*** Update File: f4\n*** Move to: f9\n@@ a\n-b\n+c\n*** End of File\n\
         *** End Patch\n",
        "*** Begin Patch\n*** Delete File: f5\n*** Update File: f20\n@@ fn a() {\n     b();\n+    c();\n }\n\
         *** End Patch\n",
        "diff --git a/f4 b/f4\nold mode 100644\nnew mode 100755\n--- a/f4\n+++ b/f4\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n",
        "diff --git a/f5 b/f6\nrename from f5\nrename to f6\n--- a/f5\n+++ b/f6\n@@ -2 +2 @@\n-b\n\\ No newline\n+c\n",
        "--- /dev/null\n+++ \"b/\\303\\274\"\t\n@@ -0,0 +1 @@\n+x\n--- a/f0\n+++ b/f0\n@@ -0,0 +1 @@\n+x\n",
    ];
    let corpus = corpus.iter().map(|text| text.as_bytes().to_vec()).collect();
    crate::feeding::feed(corpus, 30_000, |input| {
        let text = normalise(String::from_utf8_lossy(input).into_owned());
        let Ok(patch) = Patch::parse(&text) else { return };
        match plan(&patch, str::to_owned, &before, 1000) {
            Ok(changes) => assert!(changes.len() <= 2 * patch.files.len()),
            Err(failures) => assert_eq!(failures.len(), patch.files.len()),
        }
    });
}
