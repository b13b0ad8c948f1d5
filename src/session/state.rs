//! The life of a session, as pure transitions.
//!
//! ```text
//!             shell or sandbox fails for good
//!   Active ───────────────────────────────────► Dead
//!      │                                          │
//!      │ delete, idle timeout, shutdown           │ the same, or a while has passed
//!      └───────────────► Destroyed ◄──────────────┘
//! ```

/// Where a session is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Runs are taken.
    Active,
    /// Nothing runs any more; kept for a while so that its clients learn why.
    Dead {
        /// What happened.
        reason: String,
    },
    /// Gone.
    Destroyed,
}

impl State {
    /// The word in the API.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Dead { .. } => "dead",
            Self::Destroyed => "destroyed",
        }
    }

    /// The sandbox is gone; only an active session can die.
    #[must_use]
    pub fn die(self, reason: impl Into<String>) -> Self {
        match self {
            Self::Active => Self::Dead { reason: reason.into() },
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_active_die() {
        let dead = State::Active.die("first");
        assert_eq!(dead, State::Dead { reason: "first".into() });
        assert_eq!(dead.clone().die("second"), dead);
        assert_eq!(State::Destroyed.die("x"), State::Destroyed);
    }
}
