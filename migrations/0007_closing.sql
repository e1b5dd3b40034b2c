-- Where the book was closed: events up to `through` may be in the copy alone. `known` tells what the closed
-- events are about (forge.domain.closing), so that nobody has to look here for what is new.
create table if not exists forge_log.closed (
    through bigint primary key check (through > 0),
    chain bytea not null check (length(chain) = 32),
    known bytea not null,
    at timestamptz not null default now()
);
create or replace trigger closed_stays before update or delete or truncate on forge_log.closed
    for each statement execute function forge_log.refuse();

-- By what the log's filters name: a subject or its beginning, a job, an asset or a file's content.
create index if not exists entry_subject on forge_log.entry (subject text_pattern_ops, seq);
create index if not exists entry_job on forge_log.entry (split_part(subject, '.', 5))
    where split_part(subject, '.', 3) = 'job';
create index if not exists entry_asset on forge_log.entry (split_part(subject, '.', 6))
    where split_part(subject, '.', 3) in ('asset', 'pin', 'upload');
