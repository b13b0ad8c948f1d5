//! A session's files, as a client of the HTTP API works in them.

use super::Session;
use super::http::{Answer, Streaming, send_with};
use serde_json::{Value, json};
use std::path::Path;
use tar::{EntryType, Header};

/// Between the parts of forms.
pub(crate) const BOUNDARY: &str = "----execd-tests";

/// One part of a form; one without a file name has `None`.
pub(crate) struct Part<'a> {
    pub(crate) name: &'a str,
    pub(crate) file_name: Option<&'a str>,
    pub(crate) content: &'a [u8],
}

impl<'a> Part<'a> {
    pub(crate) fn file(content: &'a [u8]) -> Self {
        Self { name: "file", file_name: Some("a name"), content }
    }

    pub(crate) fn metadata(text: &'a str) -> Self {
        Self { name: "metadata", file_name: Some("metadata"), content: text.as_bytes() }
    }
}

/// The body of a form.
pub(crate) fn form(parts: &[Part<'_>]) -> Vec<u8> {
    let mut body = Vec::new();
    for Part { name, file_name, content } in parts {
        body.extend(format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"").bytes());
        body.extend(file_name.iter().flat_map(|name| format!("; filename=\"{name}\"").into_bytes()));
        body.extend(b"\r\n\r\n");
        body.extend(*content);
        body.extend(b"\r\n");
    }
    body.extend(format!("--{BOUNDARY}--\r\n").bytes());
    body
}

/// What a form says it is.
pub(crate) fn form_type() -> String {
    format!("multipart/form-data; boundary={BOUNDARY}")
}

/// A query, each value encoded.
pub(crate) fn query(pairs: &[(&str, &str)]) -> String {
    let encode = |text: &str| {
        let kept = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte);
        text.bytes()
            .map(|byte| if kept(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
            .collect::<String>()
    };
    let pairs: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
    format!("?{}", pairs.join("&"))
}

impl Session<'_> {
    /// A request about one path, or several.
    pub(crate) fn ask(&self, method: &str, route: &str, pairs: &[(&str, &str)]) -> Answer {
        self.daemon.request(method, &self.route(&format!("{route}{}", query(pairs))), b"")
    }

    pub(crate) fn tell(&self, route: &str, body: &Value) -> Answer {
        self.daemon.post(&self.route(route), body)
    }

    pub(crate) fn send(&self, method: &str, rest: &str, headers: &[(&str, &str)], body: &[u8]) -> Streaming {
        let token = self.daemon.token.as_deref();
        send_with(self.daemon.address, token, method, &self.route(rest), headers, body)
    }

    pub(crate) fn upload_form(&self, parts: &[Part<'_>]) -> Answer {
        self.send("POST", "/files/upload", &[("Content-Type", &form_type())], &form(parts)).whole()
    }

    pub(crate) fn upload_as(&self, metadata: &Value, content: &[u8]) -> Answer {
        self.upload_form(&[Part::metadata(&metadata.to_string()), Part::file(content)])
    }

    /// Uploads a file, which must succeed.
    pub(crate) fn upload(&self, path: &str, content: impl AsRef<[u8]>) {
        let answer = self.upload_as(&json!({"path": path}), content.as_ref());
        assert_eq!((answer.status, answer.text().as_str()), (200, ""), "{path}");
    }

    pub(crate) fn download(&self, path: &str) -> Answer {
        self.ask("GET", "/files/download", &[("path", path)])
    }

    pub(crate) fn content(&self, path: &str) -> String {
        let answer = self.download(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        answer.text()
    }

    /// What is told of one file, which must be there.
    pub(crate) fn info(&self, path: &str) -> Value {
        let answer = self.ask("GET", "/files/info", &[("path", path)]);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        answer.json().as_object().and_then(|infos| infos.get(path)).cloned().unwrap_or_default()
    }

    pub(crate) fn exists(&self, path: &str) -> bool {
        match self.ask("GET", "/files/info", &[("path", path)]).status {
            200 => true,
            404 => false,
            other => panic!("info of {path} answers {other}"),
        }
    }

    /// The paths that a search or a list answers.
    pub(crate) fn paths(&self, route: &str, pairs: &[(&str, &str)]) -> Vec<String> {
        let answer = self.ask("GET", route, pairs);
        assert_eq!(answer.status, 200, "{route} {pairs:?}: {}", answer.text());
        let list = answer.json();
        let path = |info: &Value| info.get("path").and_then(Value::as_str).map(str::to_owned);
        list.as_array().into_iter().flatten().filter_map(path).collect()
    }

    /// The same, relative to a folder.
    pub(crate) fn paths_in(&self, folder: &Path, route: &str, pairs: &[(&str, &str)]) -> Vec<String> {
        let prefix = format!("{}/", folder.display());
        let shorten = |path: String| path.strip_prefix(&prefix).map(str::to_owned).unwrap_or(path);
        self.paths(route, pairs).into_iter().map(shorten).collect()
    }
}

/// A tar with these files.
pub(crate) fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        append(&mut builder, EntryType::Regular, path, "", content);
    }
    builder.into_inner().unwrap()
}

/// Adds an entry as it is; the library itself would refuse some of these names.
pub(crate) fn append(
    builder: &mut tar::Builder<Vec<u8>>,
    kind: EntryType,
    path: &str,
    link: &str,
    content: &[u8],
) {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o4755);
    header.set_uid(7);
    header.set_size(content.len() as u64);
    header.set_cksum();
    builder.append(&header, content).unwrap();
}
