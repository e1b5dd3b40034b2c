-- D4: who fetched which asset, and when. One row for each asset and user; it goes with the asset.
create table asset_usage (
    asset_id uuid not null,
    user_id text not null,
    reads bigint not null,
    first_at timestamptz not null,
    last_at timestamptz not null,
    seq bigint not null,
    primary key (asset_id, user_id)
);
alter table asset_inventory add column accessed_seq bigint;
-- room in every page, so that counting a fetch touches no index
alter table asset_inventory set (fillfactor = 80);

-- Words of three letters and more are found through trigrams, where Postgres has them and lets us.
do $$
declare
    home text;
begin
    begin
        create extension if not exists pg_trgm;
    exception when insufficient_privilege or feature_not_supported or undefined_file then
        null;
    end;
    select quote_ident(n.nspname) into home
    from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'pg_trgm';
    if home is null then
        raise warning 'searching for words will be slow: the extension pg_trgm is not there and cannot be created';
    else
        execute format(
            'create index asset_inventory_search on asset_inventory using gin (search %s.gin_trgm_ops)', home);
    end if;
end
$$;

-- Chinese, Japanese and Korean have words of one and two signs, and trigrams know nothing of them: these are the
-- signs of a text, and the pairs of signs that stand side by side.
create function forge_signs(given text) returns text[]
language sql immutable parallel safe cost 10000
begin atomic
    with sign as (
        select g as at, substr(given, g::integer, 1) as sign
        from generate_series(1, length(given)) g
        where given ~ '[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]'
    ), written as (
        select at, sign from sign
        where sign ~ '[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]'
    )
    select coalesce(array_agg(distinct found), '{}')
    from (
        select sign as found from written
        union all
        select a.sign || b.sign from written a join written b on b.at = a.at + 1
    ) both_kinds;
end;
create index asset_inventory_signs on asset_inventory using gin (forge_signs(search));
