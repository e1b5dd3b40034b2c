-- The same signs, found without a look letter by letter where there are none: an index asks for those of every row,
-- and most texts are English.
create or replace function forge_signs(given text) returns text[]
language plpgsql immutable parallel safe cost 10000 as $$
declare
    signs constant text :=
        '[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]';
begin
    if given !~ signs then
        return '{}';
    end if;
    return (
        with written as (
            select g as at, substr(given, g, 1) as sign
            from generate_series(1, length(given)) g
            where substr(given, g, 1) ~ signs
        )
        select coalesce(array_agg(distinct one), '{}')
        from (
            select sign as one from written
            union all
            select a.sign || b.sign from written a join written b on b.at = a.at + 1
        ) both_kinds
    );
end
$$;
