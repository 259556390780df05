//! From what a user names, a folder or a repo id of Hugging Face, to a folder with a checkpoint in it: the
//! local cache first, the network for what is missing there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use super::download::{Heard, verify, watched};
use crate::model::Config;
use crate::{Error, Result};

/// How much of a checkpoint a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Need {
    /// Its configuration.
    Config,
    /// The weights too.
    Weights,
    /// The tokenizer too.
    Text,
}

const CONFIG: &str = "config.json";
const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
/// What is taken along where a repo has it.
const OPTIONAL: [&str; 5] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Where files are looked for.
#[derive(Clone)]
struct Hub {
    cache: Cache,
    endpoint: String,
    token: Option<String>,
    offline: bool,
    /// How long a server may say nothing.
    silence: Duration,
}

/// The folder of a checkpoint: `named` itself where it is one, else the snapshot of that repo.
///
/// # Errors
/// [`Error::Invalid`] when it is neither, or when files are missing from the cache and cannot be downloaded:
/// it names them, and where they were looked for.
pub(super) fn folder(named: &str, need: Need) -> Result<PathBuf> {
    let path = Path::new(named);
    if path.is_dir() {
        return Ok(path.into());
    }
    if path.exists() || !is_repo(named) {
        let found = if path.exists() { "a file" } else { "nothing there" };
        let expected = "a checkpoint's folder, or a repo id such as deepseek-ai/DeepSeek-V2-Lite";
        return Err(invalid(path, "the checkpoint", expected.into(), found.into()));
    }
    Hub::from_env().folder(named, need)
}

impl Hub {
    /// As the hub's own library reads the environment.
    fn from_env() -> Hub {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let home = || {
            set("HF_HOME").map(PathBuf::from).or_else(|| Some(Path::new(&set("XDG_CACHE_HOME")?).join("huggingface")))
        };
        let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let usual = || dirs::home_dir().unwrap_or_default().join(".cache").join("huggingface").join("hub");
        let cache = Cache::new(cache.or_else(|| Some(home()?.join("hub"))).unwrap_or_else(usual));
        let yes = |value: String| ["1", "on", "yes", "true"].contains(&&*value.to_lowercase());
        Hub {
            endpoint: set("HF_ENDPOINT").unwrap_or("https://huggingface.co".into()),
            token: set("HF_TOKEN").or_else(|| cache.token()),
            offline: set("HF_HUB_OFFLINE").is_some_and(yes),
            cache,
            silence: Duration::from_secs(60),
        }
    }

    fn folder(&self, named: &str, need: Need) -> Result<PathBuf> {
        let repo = Repo::model(named.into());
        let missing = match self.cache.repo(repo.clone()).get(CONFIG) {
            Some(config) => {
                let snapshot = config.parent().unwrap_or(Path::new("")).to_path_buf();
                match missing(&snapshot, need)? {
                    files if files.is_empty() => return Ok(snapshot),
                    files => files,
                }
            }
            None => wanted(need),
        };
        let place = self.cache.path().join(repo.folder_name());
        let not_there = |why: String| {
            let found = format!("none of these in the cache, and {why}");
            invalid(&place, &format!("the files of {named}"), missing.join(", "), found)
        };
        if self.offline {
            return Err(not_there("HF_HUB_OFFLINE forbids to download them".into()));
        }
        let (hub, repo) = (self.clone(), named.to_string());
        match watched(self.silence, move |heard| hub.download(&repo, need, heard)) {
            Some(Err(Fault::Api(fault))) => {
                Err(not_there(format!("downloading them from {} failed: {fault}", self.endpoint)))
            }
            Some(Err(Fault::Lamina(error))) => Err(error),
            Some(Ok(folder)) => Ok(folder),
            None => Err(not_there(format!("{} said nothing for {:?}", self.endpoint, self.silence))),
        }
    }

    /// Brings what is needed into the cache, all of one commit. A model that lamina does not run is refused by
    /// its configuration, before its weights are fetched.
    fn download(&self, named: &str, need: Need, heard: &Heard) -> std::result::Result<PathBuf, Fault> {
        let api = ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(3)
            .build()?;
        let main = Repo::model(named.into());
        let info = api.repo(main.clone()).info()?;
        let commit = Repo::with_revision(named.into(), RepoType::Model, info.sha.clone());
        let cached = self.cache.repo(commit.clone());
        cached.create_ref(&info.sha).map_err(ApiError::from)?;
        let api = api.repo(commit);
        // From the cache, or downloaded, going on where an earlier download stopped.
        let fetch = |file: &str| -> std::result::Result<PathBuf, Fault> {
            if let Some(path) = cached.get(file) {
                return Ok(path);
            }
            let path = api.download_with_progress(file, heard.bar())?;
            verify(&path, heard)?;
            Ok(path)
        };
        let config = fetch(CONFIG)?;
        self.cache.repo(main).create_ref(&info.sha).map_err(ApiError::from)?;
        let folder = config.parent().unwrap_or(Path::new("")).to_path_buf();
        Config::open(&folder)?;
        if need == Need::Config {
            return Ok(folder);
        }
        let files: BTreeSet<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        let mut wanted: Vec<String> = OPTIONAL.iter().map(|file| file.to_string()).collect();
        wanted.retain(|file| files.contains(file));
        if need == Need::Text {
            wanted.push(TOKENIZER.into());
        }
        match files.contains(WHOLE) || !files.contains(INDEX) {
            true => wanted.push(WHOLE.into()),
            false => wanted.extend(shards(&fetch(INDEX)?)?),
        }
        wanted.iter().try_for_each(|file| fetch(file).map(drop))?;
        Ok(folder)
    }
}

/// One slash, and the characters that the hub allows.
fn is_repo(named: &str) -> bool {
    let plain = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(allowed)
    };
    named.split_once('/').is_some_and(|(owner, name)| plain(owner) && plain(name))
}

/// The files that stand for what is needed, as long as nothing more is known.
fn wanted(need: Need) -> Vec<String> {
    let mut files = vec![CONFIG.to_string()];
    if need >= Need::Weights {
        files.push(format!("{WHOLE} (or {INDEX} and its shards)"));
    }
    if need >= Need::Text {
        files.push(TOKENIZER.into());
    }
    files
}

/// Files that a snapshot lacks.
fn missing(snapshot: &Path, need: Need) -> Result<Vec<String>> {
    let mut files = Vec::new();
    if need >= Need::Weights && !snapshot.join(WHOLE).exists() {
        match snapshot.join(INDEX) {
            index if index.exists() => files.extend(shards(&index)?),
            _ => files.push(format!("{WHOLE} (or {INDEX} and its shards)")),
        }
    }
    if need >= Need::Text {
        files.push(TOKENIZER.into());
    }
    files.retain(|file| !snapshot.join(file).exists());
    Ok(files)
}

/// The files that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read(index).map_err(|source| Error::Io { path: index.into(), source })?;
    let wrong = |found: &str| invalid(index, "weight_map", "an object of tensors and files".into(), found.into());
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|fault| wrong(&format!("a fault: {fault}")))?;
    let map = value.get("weight_map").and_then(serde_json::Value::as_object).ok_or_else(|| wrong("none"))?;
    let plain = |file: &serde_json::Value| {
        let file = file.as_str().filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file));
        file.map(String::from).ok_or_else(|| wrong("a file outside of the folder"))
    };
    map.values().map(plain).collect()
}

fn invalid(file: &Path, what: &str, expected: String, found: String) -> Error {
    Error::Invalid { file: file.into(), what: what.into(), expected, found }
}

enum Fault {
    Api(ApiError),
    Lamina(Error),
}

impl From<ApiError> for Fault {
    fn from(fault: ApiError) -> Fault {
        Fault::Api(fault)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Lamina(error)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A repo's files behind a server like the hub's, and what was asked of it.
    struct Server {
        endpoint: String,
        asked: Arc<Mutex<Vec<String>>>,
    }

    impl Server {
        fn start(files: &[(&str, &[u8])]) -> Server {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
            let files: HashMap<String, Vec<u8>> =
                files.iter().map(|(name, text)| (name.to_string(), text.to_vec())).collect();
            let asked = Arc::new(Mutex::new(Vec::new()));
            let heard = asked.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (files, heard) = (files.clone(), heard.clone());
                    std::thread::spawn(move || while answer(&stream, &files, &heard).is_some() {});
                }
            });
            Server { endpoint, asked }
        }

        /// The file and first byte of each download, without the questions for sizes.
        fn downloads(&self) -> Vec<String> {
            let asked = self.asked.lock().expect("no panic in the server");
            asked.iter().filter(|line| !line.ends_with("bytes=0-0")).cloned().collect()
        }
    }

    /// Answers one request; `None` when there are no more.
    fn answer(stream: &TcpStream, files: &HashMap<String, Vec<u8>>, asked: &Mutex<Vec<String>>) -> Option<()> {
        let lines = BufReader::new(stream).lines().map_while(std::io::Result::ok);
        let request: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let path = request.first()?.split(' ').nth(1)?.to_string();
        let mut stream = stream;
        if path.starts_with("/api/models/") {
            let siblings: Vec<_> = files.keys().map(|file| serde_json::json!({ "rfilename": file })).collect();
            let body = serde_json::json!({"sha": "abc123", "siblings": siblings}).to_string();
            return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).ok();
        }
        let file = path.rsplit('/').next()?;
        let range = request.iter().find_map(|line| line.to_lowercase().strip_prefix("range: ").map(String::from));
        let range = range.unwrap_or_default();
        asked.lock().expect("no panic in the server").push(format!("{file} {range}"));
        let Some(whole) = files.get(file) else {
            return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").ok();
        };
        let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap_or(("0", ""));
        let first: usize = first.parse().unwrap_or(0);
        let last = last.parse().unwrap_or(whole.len() - 1).min(whole.len() - 1);
        let part = &whole[first.min(last + 1)..=last];
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{}\r\n\
             ETag: \"{}\"\r\nX-Repo-Commit: abc123\r\n\r\n",
            part.len(),
            whole.len(),
            if file == LARGE { SHA256_OF_MUCH.into() } else { format!("{file}-tag") }
        )
        .ok()?;
        stream.write_all(part).ok()
    }

    /// An empty cache.
    fn cache(name: &str) -> Cache {
        let folder = std::env::temp_dir().join(format!("lamina hub {name} {}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        Cache::new(folder)
    }

    fn hub(name: &str, endpoint: &str) -> Hub {
        Hub {
            cache: cache(name),
            endpoint: endpoint.into(),
            token: None,
            offline: false,
            silence: Duration::from_secs(60),
        }
    }

    /// A file that goes by its SHA-256: that of "much".
    const LARGE: &str = "large.safetensors";
    const SHA256_OF_MUCH: &str = "543b1c4bd4f6b184ca2aef09ca8e5aeadb04907efa0ac7b81b00f8b9ea8133cd";
    const MODEL: &[u8] = include_bytes!("../../tests/data/configs/deepseek_v3.json");
    const SHARDS: &[u8] = br#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}"#;

    #[test]
    fn a_repo_is_downloaded_once_and_then_found() {
        let whole = [("config.json", MODEL), (INDEX, SHARDS), ("1.safetensors", b"one"), ("2.safetensors", b"two")];
        let server = Server::start(&[&whole[..], &[("README.md", b"#"), ("generation_config.json", b"{}")]].concat());
        let mut hub = hub("download", &server.endpoint);
        let folder = hub.folder("owner/model", Need::Weights).expect("a snapshot");
        assert!(folder.ends_with("models--owner--model/snapshots/abc123"), "{}", folder.display());
        for (name, text) in whole {
            assert_eq!(std::fs::read(folder.join(name)).expect(name), text);
        }
        assert!(folder.join("generation_config.json").exists() && !folder.join("README.md").exists());

        let downloads = server.downloads().len();
        hub.offline = true;
        assert_eq!(hub.folder("owner/model", Need::Weights).expect("it is there"), folder);
        assert_eq!(server.downloads().len(), downloads);
        let error = hub.folder("owner/model", Need::Text).expect_err("no tokenizer").to_string();
        assert!(error.contains("expected tokenizer.json, found none of these in the cache"), "{error}");
        hub.offline = false;
        let error = hub.folder("owner/model", Need::Text).expect_err("the repo has none either").to_string();
        assert!(error.contains("tokenizer.json") && error.contains("404"), "{error}");
        std::fs::remove_dir_all(hub.cache.path()).expect("it is there");
    }

    #[test]
    fn a_download_goes_on_where_it_stopped() {
        let server = Server::start(&[("config.json", MODEL), (WHOLE, b"0123456789")]);
        let hub = hub("resume", &server.endpoint);
        let blobs = hub.cache.path().join("models--owner--model/blobs");
        std::fs::create_dir_all(&blobs).expect("a folder");
        // What hf-hub leaves of a download that was cut.
        std::fs::write(blobs.join("model.safetensors-tag").with_extension("part"), b"0123").expect("a file");
        let folder = hub.folder("owner/model", Need::Weights).expect("a snapshot");
        assert_eq!(std::fs::read(folder.join(WHOLE)).expect("it is there"), b"0123456789");
        let last = server.downloads().pop().expect("a download");
        assert!(last.starts_with("model.safetensors bytes=4-"), "{last}");
        std::fs::remove_dir_all(hub.cache.path()).expect("it is there");
    }

    #[test]
    fn a_model_that_is_refused_is_not_downloaded() {
        let config = br#"{"model_type": "deepseek_v4"}"#;
        let server = Server::start(&[("config.json", config), (WHOLE, b"much")]);
        let hub = hub("refused", &server.endpoint);
        let error = hub.folder("owner/model", Need::Weights).expect_err("it does not run").to_string();
        assert!(error.ends_with("not supported"), "{error}");
        assert!(server.downloads().iter().all(|file| file.starts_with("config.json")), "{:?}", server.downloads());
        std::fs::remove_dir_all(hub.cache.path()).expect("it is there");
    }

    #[test]
    fn what_came_is_held_against_its_hash() {
        let index: &[u8] = br#"{"weight_map": {"a": "large.safetensors"}}"#;
        for (came, right) in [(b"much", true), (b"such", false)] {
            let server = Server::start(&[("config.json", MODEL), (INDEX, index), (LARGE, came)]);
            let hub = hub(if right { "hash" } else { "no hash" }, &server.endpoint);
            let found = hub.folder("owner/model", Need::Weights);
            let blob = hub.cache.path().join("models--owner--model/blobs").join(SHA256_OF_MUCH);
            assert_eq!((found.is_ok(), blob.exists()), (right, right));
            if let Err(error) = found {
                let error = error.to_string();
                assert!(error.contains(LARGE) && error.contains(SHA256_OF_MUCH), "{error}");
            }
            std::fs::remove_dir_all(hub.cache.path()).expect("it is there");
        }
    }

    #[test]
    fn a_server_that_says_nothing_is_not_waited_for() {
        let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", silent.local_addr().expect("an address"));
        let hub = Hub { silence: Duration::from_millis(300), ..hub("silent", &endpoint) };
        let error = hub.folder("owner/model", Need::Config).expect_err("no answer").to_string();
        assert!(error.contains(&format!("{endpoint} said nothing for 300ms")), "{error}");
    }

    #[test]
    fn without_a_network_the_missing_files_are_named_with_their_place() {
        // Nobody listens on port 1.
        let mut hub = hub("offline", "http://127.0.0.1:1");
        let error = hub.folder("owner/model", Need::Text).expect_err("no network").to_string();
        for part in ["models--owner--model", "config.json, model.safetensors", "tokenizer.json", "http://127.0.0.1:1"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let snapshot = hub.cache.path().join("models--owner--model/snapshots/c0ffee");
        std::fs::create_dir_all(&snapshot).expect("a folder");
        hub.cache.model("owner/model".into()).create_ref("c0ffee").expect("a file");
        for (name, text) in [("config.json", MODEL), (INDEX, SHARDS), ("1.safetensors", b"one")] {
            std::fs::write(snapshot.join(name), text).expect("a file");
        }
        hub.offline = true;
        assert_eq!(hub.folder("owner/model", Need::Config).expect("it is there"), snapshot);
        let error = hub.folder("owner/model", Need::Weights).expect_err("a shard is missing").to_string();
        assert!(
            error.contains("expected 2.safetensors, found none of these") && error.contains("HF_HUB_OFFLINE"),
            "{error}"
        );
        std::fs::remove_dir_all(hub.cache.path()).expect("it is there");
    }

    #[test]
    fn repo_ids_are_told_from_paths() {
        for id in ["deepseek-ai/DeepSeek-V2-Lite", "a/b", "openbmb/MiniCPM3-4B", "x_1/y.z"] {
            assert!(is_repo(id), "{id}");
        }
        for path in ["", "model", "/a/b", "./a", "../b", "a/b/c", "a/", "/b", "~/a b", "a\\b", "a/.."] {
            assert!(!is_repo(path), "{path}");
        }
    }
}
