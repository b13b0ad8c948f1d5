//! Directories, permissions and owners.

use super::error::{Call, Class, FileError};
use super::path::RootedPath;
use super::stage::{Attributes, PARENT_MODE};
use super::tree::{Last, Node, Worker, kind, proc_path};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid};
use rustix::io::Errno;
use std::path::Path;

/// An owner and a group, as numbers of the daemon; what is absent stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Ownership {
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

impl Ownership {
    pub(super) fn ids(self) -> (Option<Uid>, Option<Gid>) {
        (self.uid.map(Uid::from_raw), self.gid.map(Gid::from_raw))
    }
}

impl Worker<'_> {
    /// Gives a file permissions and owners; links are followed, as chmod(1) does.
    ///
    /// # Errors
    /// When the session could not do that.
    pub fn permit(&self, text: &str, wanted: &Attributes) -> Result<(), FileError> {
        let path = self.path(text)?;
        let node = self.node(&path, Last::Follow)?;
        super::tree::refuse_kernel(&node.fd, &path)?;
        self.apply(&node, wanted.mode, self.ownership(wanted)?, &path)
    }

    /// Whether [`Worker::permit`] makes sense, without doing anything.
    ///
    /// # Errors
    /// A missing file, an unknown name.
    pub fn check_permit(&self, text: &str, wanted: &Attributes) -> Result<(), FileError> {
        self.ownership(wanted)?;
        self.node(&self.path(text)?, Last::Follow).map(drop)
    }

    /// Makes a directory, and those on the way to it. One that exists stays as it is.
    ///
    /// # Errors
    /// When something else is in the way.
    pub fn make_directory(&self, text: &str, wanted: &Attributes) -> Result<(), FileError> {
        let path = self.path(text)?;
        let ownership = self.ownership(wanted)?;
        if let Some(node) = self.node_if_any(&path, Last::Follow)? {
            return match kind(&node.stat) {
                FileType::Directory => Ok(()),
                _ => Err(FileError::refused(&path, Class::Invalid, "exists and is no directory")),
            };
        }
        self.make_directories(&path, PARENT_MODE)?;
        let node = self.node(&path, Last::Follow)?;
        self.apply(&node, wanted.mode, ownership, &path)
    }

    /// The directory at a path; those that are missing are made.
    pub(super) fn make_directories(&self, path: &RootedPath, mode: u32) -> Result<OwnedFd, FileError> {
        match self.directory(path) {
            Err(error) if error.errno() == Some(Errno::NOENT) => {}
            found => return found,
        }
        // From the top, by whole paths: each step is resolved as the session would.
        let mut made: Option<RootedPath> = None;
        for component in Path::new(path.as_ref()).components() {
            let next = made.map_or_else(|| self.path("/"), |made| Ok(made.join(component)))?;
            if let Err(error) = self.directory(&next) {
                if error.errno() != Some(Errno::NOENT) {
                    return Err(error);
                }
                let (parent, name) = self.entry(&next)?;
                match rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(mode)) {
                    // Somebody else was faster; or it is a link to nowhere, which shows in a moment.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno).call("mkdirat", &next),
                }
            }
            made = Some(next);
        }
        self.directory(path)
    }

    pub(super) fn apply(
        &self,
        node: &Node,
        mode: Option<u32>,
        ownership: Ownership,
        path: &RootedPath,
    ) -> Result<(), FileError> {
        let (uid, gid) = ownership.ids();
        if uid.is_some() || gid.is_some() {
            rustix::fs::chownat(&node.fd, "", uid, gid, AtFlags::EMPTY_PATH).call("fchownat", path)?;
        }
        // Last, since a change of owner takes set-uid bits away (chown(2)).
        if let Some(mode) = mode {
            rustix::fs::chmod(proc_path(&node.fd), Mode::from_raw_mode(mode)).call("chmod", path)?;
        }
        Ok(())
    }

    pub(super) fn ownership(&self, wanted: &Attributes) -> Result<Ownership, FileError> {
        let (accounts, ids) = (self.accounts_if(wanted), self.tree.ids());
        let find = |what: &str, text: &Option<String>, id: &dyn Fn(&str) -> Option<u32>| {
            let Some(text) = text.as_deref().filter(|text| !text.is_empty()) else { return Ok(None) };
            let unknown = || FileError::invalid(what, format!("the session knows no {what} {text:?}"));
            id(text).ok_or_else(unknown).map(Some)
        };
        let uid = find("owner", &wanted.owner, &|text| accounts?.uid(text))?;
        let gid = find("group", &wanted.group, &|text| accounts?.gid(text))?;
        // An id that is not mapped cannot be given, just as inside.
        let outside = |id: Option<u32>, map: &dyn Fn(u32) -> Option<u32>| match id {
            None => Ok(None),
            Some(id) => map(id).map(Some).ok_or(Errno::PERM).call("fchownat", id.to_string()),
        };
        Ok(Ownership {
            uid: outside(uid, &|id| ids.uid_outside(id))?,
            gid: outside(gid, &|id| ids.gid_outside(id))?,
        })
    }

    /// The accounts, unless no name has to be looked up.
    fn accounts_if(&self, wanted: &Attributes) -> Option<&super::accounts::Accounts> {
        (wanted.owner.is_some() || wanted.group.is_some()).then(|| self.accounts())
    }
}
