-- By which event each checkpoint stands, so that another log with the same numbers is known for another.
alter table projection_checkpoint add column event_id uuid;

-- The log's second copy, which only ever grows. `chain` is the sha256 of the entry before it and of this one.
-- A schema of its own: whoever drops the tables that the log rebuilds does not drop the copy with them.
do $$
begin
    if to_regnamespace('forge_log') is null then
        create schema forge_log;
    end if;
exception when insufficient_privilege then
    raise exception 'forge may make no schema here: as administrator of this database, '
        'create schema forge_log authorization %', quote_ident(current_user);
end
$$;
create table if not exists forge_log.entry (
    seq bigint primary key check (seq > 0),
    subject text not null,
    headers jsonb not null,
    data bytea not null,
    arrived timestamptz not null,
    chain bytea not null check (length(chain) = 32)
);

create or replace function forge_log.refuse() returns trigger language plpgsql as $$
begin
    raise exception 'forge_log.% is only ever added to', tg_table_name;
end
$$;
create or replace trigger entry_stays before update or delete or truncate on forge_log.entry
    for each statement execute function forge_log.refuse();
