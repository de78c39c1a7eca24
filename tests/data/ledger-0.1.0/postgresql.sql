CREATE TABLE public.ledger_version (
    version integer NOT NULL
);
CREATE TABLE public.tasks (
    workspace text NOT NULL,
    id text NOT NULL,
    model text NOT NULL,
    finished text,
    credits bigint NOT NULL,
    created bigint,
    first_seen bigint NOT NULL,
    unlisted_since bigint
);
CREATE TABLE public.totals (
    workspace text NOT NULL,
    model text NOT NULL,
    metric text NOT NULL,
    label text NOT NULL,
    value bigint NOT NULL,
    held boolean NOT NULL,
    answered_at bigint,
    shown boolean NOT NULL,
    exemplar text
);
CREATE TABLE public.workspaces (
    name text NOT NULL,
    baseline_at bigint,
    floor bigint,
    revision bigint NOT NULL,
    tasks bigint NOT NULL
);
INSERT INTO public.ledger_version VALUES (1);
INSERT INTO public.tasks VALUES ('w', 'old', 'm', 'done', 5000000000, 1760000000000000, 1760000000000000, NULL);
INSERT INTO public.tasks VALUES ('w', 'new-0', 'm', 'failed', 100000000, 1760000001000000, 1760000060000000, NULL);
INSERT INTO public.tasks VALUES ('w', 'new-1', 'm', 'failed', 100000000, 1760000001000000, 1760000060000000, NULL);
INSERT INTO public.tasks VALUES ('w', 'new-2', 'm', 'failed', 100000000, 1760000001000000, 1760000060000000, NULL);
INSERT INTO public.tasks VALUES ('w', 'new-3', 'm', 'failed', 100000000, 1760000001000000, 1760000060000000, NULL);
INSERT INTO public.tasks VALUES ('w', 'busy', 'm', NULL, 3000000000, 1760000000000000, 1760000000000000, NULL);
INSERT INTO public.tasks VALUES ('w', 'other', 'n', 'done', 0, 1760000001000000, 1760000120000000, NULL);
INSERT INTO public.tasks VALUES ('w', 'left-done', 'm', 'done', 2000000000, 1760000001000000, 1760000060000000, 1760000120000000);
INSERT INTO public.tasks VALUES ('w', 'left-running', 'm', NULL, 250000000, 1760000001000000, 1760000060000000, 1760000120000000);
INSERT INTO public.totals VALUES ('w', 'n', 'submitted', '', 1, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'finished', 'done', 1, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/7', 1, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'failures', 'other', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'duration', 'done', 100000000, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/0', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/1', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/2', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/3', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/5', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/6', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/7', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/8', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/9', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/10', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/3', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/4', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/5', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/6', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/7', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/8', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/9', 0, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'credits', '', 4650000000, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'submitted', '', 6, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'finished', 'done', 1, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'done/4', 1, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'duration', 'done', 7000000, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'finished', 'failed', 4, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'failures', 'timeout', 4, false, 1760000000000000, true, 'new-3');
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/0', 1, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'duration', 'failed', 654000000, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/1', 1, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/2', 1, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'm', 'bucket', 'failed/10', 1, false, 1760000000000000, true, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'credits', '', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'failures', 'timeout', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'failures', 'other', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/0', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/1', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/2', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/3', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/4', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/5', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/6', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/8', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/9', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'done/10', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'finished', 'failed', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'duration', 'failed', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/0', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/1', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/2', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/3', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/4', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/5', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/6', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/7', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/8', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/9', 0, true, NULL, false, NULL);
INSERT INTO public.totals VALUES ('w', 'n', 'bucket', 'failed/10', 0, true, NULL, false, NULL);
INSERT INTO public.workspaces VALUES ('w', 1760000000000000, 1759996400000000, 3, 9);
INSERT INTO public.workspaces VALUES ('v', 1760000000000000, 1759996400000000, 1, 0);
ALTER TABLE ONLY public.tasks
    ADD CONSTRAINT tasks_pkey PRIMARY KEY (workspace, id);
ALTER TABLE ONLY public.totals
    ADD CONSTRAINT totals_pkey PRIMARY KEY (workspace, model, metric, label);
ALTER TABLE ONLY public.workspaces
    ADD CONSTRAINT workspaces_pkey PRIMARY KEY (name);
CREATE INDEX tasks_unlisted ON public.tasks USING btree (workspace, unlisted_since) WHERE (unlisted_since IS NOT NULL);
