//! A message socket that carries serde values and descriptors.
//!
//! `SOCK_SEQPACKET` keeps message boundaries and reports the peer's death as end of file. A message over
//! `INLINE_BYTES_MAX` travels in a memfd, so that a large environment does not depend on
//! `net.core.wmem_max`. Descriptors are received with close-on-exec set.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;

/// Messages up to this size travel in the packet itself; bytes.
const INLINE_BYTES_MAX: usize = 32 * 1024;
/// The largest message at all; bytes. An environment may fill the kernel's argument space (2 MiB) and more.
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The most descriptors in one message, one that carries a large message included.
pub const FDS_MAX: usize = 8;

const INLINE: u8 = 0;
const IN_MEMFD: u8 = 1;

/// One end of a message socket.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A message with the descriptors that came along.
#[derive(Debug)]
pub struct Received<T> {
    /// The decoded value.
    pub message: T,
    /// What followed the value in the packet.
    pub rest: Vec<u8>,
    /// Descriptors in the order they were sent.
    pub fds: std::vec::IntoIter<OwnedFd>,
}

impl<T> Received<T> {
    /// The next descriptor.
    ///
    /// # Errors
    /// `InvalidData` when the sender attached fewer.
    pub fn fd(&mut self) -> io::Result<OwnedFd> {
        self.fds.next().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a descriptor is missing"))
    }
}

impl Channel {
    /// Two connected ends, both close-on-exec.
    ///
    /// # Errors
    /// `EMFILE` or `ENFILE`.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(a), Self(b)))
    }

    /// Takes over a socket that [`Channel::pair`] made, for instance after it was inherited.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The socket itself, for passing on.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends `message`, followed by the bytes of `rest` as they are, with `fds` attached. Blocks while the
    /// peer's queue is full.
    ///
    /// # Errors
    /// `EPIPE` when the peer is gone.
    pub fn send<T: Serialize>(&self, message: &T, rest: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut packet = postcard::to_extend(message, vec![INLINE]).map_err(io::Error::other)?;
        packet.extend_from_slice(rest);
        let memfd;
        let mut attached = Vec::with_capacity(fds.len() + 1);
        if packet.len() > INLINE_BYTES_MAX {
            let mut file = std::fs::File::from(memfd_create("execd-message", MemfdFlags::CLOEXEC)?);
            file.write_all(packet.get(1..).unwrap_or_default())?;
            seek(&file, SeekFrom::Start(0))?;
            packet = vec![IN_MEMFD];
            memfd = file;
            attached.push(memfd.as_fd());
        }
        attached.extend_from_slice(fds);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !attached.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&attached)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        rustix::io::retry_on_intr(|| {
            sendmsg(&self.0, &[IoSlice::new(&packet)], &mut control, SendFlags::NOSIGNAL)
        })?;
        Ok(())
    }

    /// Waits for the next message; `None` when the peer is gone.
    ///
    /// # Errors
    /// `WouldBlock` when a receive timeout was set and passed; `InvalidData` when the packet does not decode.
    pub fn recv<T: DeserializeOwned>(&self) -> io::Result<Option<Received<T>>> {
        self.recv_with(RecvFlags::empty())
    }

    /// Like [`Channel::recv`], but never blocks.
    ///
    /// # Errors
    /// `WouldBlock` when nothing has come; otherwise as `recv`.
    pub fn try_recv<T: DeserializeOwned>(&self) -> io::Result<Option<Received<T>>> {
        self.recv_with(RecvFlags::DONTWAIT)
    }

    fn recv_with<T: DeserializeOwned>(&self, flags: RecvFlags) -> io::Result<Option<Received<T>>> {
        // Asked first: a buffer for the largest packet costs a process that was just forked a page fault for each
        // of its pages.
        let mut nothing = [0_u8; 0];
        let peek = flags | RecvFlags::PEEK | RecvFlags::TRUNC;
        let size = match rustix::io::retry_on_intr(|| recv(&self.0, &mut nothing, peek)) {
            Ok((_, size)) => size,
            Err(Errno::CONNRESET) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let mut packet = vec![0_u8; size];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut packet)],
                &mut control,
                flags | RecvFlags::CMSG_CLOEXEC,
            )
        });
        let received = match received {
            Err(Errno::CONNRESET) => return Ok(None),
            other => other?,
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "truncated message"));
        }
        packet.truncate(received.bytes);
        let mut fds = fds.into_iter();
        match packet.first() {
            Some(&INLINE) => {
                packet.remove(0);
            }
            _ => {
                let memfd = fds.next().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                packet.clear();
                std::fs::File::from(memfd).take(MESSAGE_BYTES_MAX as u64).read_to_end(&mut packet)?;
            }
        }
        let (message, rest) = postcard::take_from_bytes(&packet)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some(Received { message, rest: rest.to_vec(), fds }))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_messages_arrive_with_their_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        for size in [0, 10, INLINE_BYTES_MAX - 8, INLINE_BYTES_MAX, 3_000_000] {
            let text = "x".repeat(size);
            a.send(&text, b"tail", &[null.as_fd(), null.as_fd()]).unwrap();
            let mut got = b.recv::<String>().unwrap().unwrap();
            assert_eq!(got.message.len(), size);
            assert_eq!(got.rest, b"tail");
            assert!(got.fd().is_ok() && got.fd().is_ok() && got.fd().is_err());
        }
    }

    #[test]
    fn a_gone_peer_is_end_of_file_and_silence_is_would_block() {
        let (a, b) = Channel::pair().unwrap();
        assert_eq!(b.try_recv::<u8>().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert!(b.recv::<u8>().unwrap().is_none());
    }
}
