-- What folds knew at one event of the log, so that a process that starts need not read what is before it. A
-- cache: rows may be deleted at any time. `rules` tells by which code a state was folded.
create table if not exists forge_log.snapshot (
    of text not null,
    rules bytea not null check (length(rules) = 32),
    seq bigint not null check (seq > 0),
    event text not null,
    state bytea not null,
    at timestamptz not null default now(),
    primary key (of, rules)
);
