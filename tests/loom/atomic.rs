//! loom's atomics, which can be told to forget the order of their stores or of their loads: a model that holds must
//! stop holding when a word that it rests upon does.

pub use loom::sync::atomic::Ordering;

/// What a word's order is not kept of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forgets {
    #[default]
    Nothing,
    Stores,
    Loads,
}

macro_rules! atomic {
    ($($name:ident $value:ty),+) => {
        $(
            pub struct $name {
                word: loom::sync::atomic::$name,
                forgets: Forgets,
            }

            #[allow(dead_code, reason = "not every width needs every operation")]
            impl $name {
                pub fn new(value: $value) -> $name {
                    $name::forgetting(value, Forgets::Nothing)
                }
                pub fn forgetting(value: $value, forgets: Forgets) -> $name {
                    $name { word: loom::sync::atomic::$name::new(value), forgets }
                }
                fn of_load(&self, order: Ordering) -> Ordering {
                    if self.forgets == Forgets::Loads { Ordering::Relaxed } else { order }
                }
                fn of_store(&self, order: Ordering) -> Ordering {
                    if self.forgets == Forgets::Stores { Ordering::Relaxed } else { order }
                }
                pub fn load(&self, order: Ordering) -> $value {
                    self.word.load(self.of_load(order))
                }
                pub fn store(&self, value: $value, order: Ordering) {
                    self.word.store(value, self.of_store(order));
                }
                pub fn swap(&self, value: $value, order: Ordering) -> $value {
                    self.word.swap(value, self.of_store(order))
                }
                pub fn compare_exchange(
                    &self,
                    current: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.word.compare_exchange(current, new, self.of_store(success), failure)
                }
            }
        )+
    };
}

atomic!(AtomicBool bool, AtomicU32 u32, AtomicU64 u64);
