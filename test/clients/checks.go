package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	records   = 100 // per client
	committed = 7   // offset that the group of java-groups is at

	limit       = 60 * time.Second // for a call that should end by itself
	deniedLimit = 40 * time.Second // for a client to say that it is refused
)

// check is one column of the table. Its checks are run in this order for each client, on that client's own topic.
type check struct {
	name string
	run  func(context.Context, *rig, *client) error
}

var checks = []check{
	{"produce", produces},
	{"group", consumesInAGroup},
	{"regex", consumesWhatItMaySee},
	{"list", seesOnlyWhatIsPermitted},
	{"write denied", isRefusedToWrite},
	{"read denied", isRefusedToRead},
}

func (c *client) call(check, command string) call {
	return call{
		name: c.name + "-" + strings.ReplaceAll(check, " ", "-"), command: command,
		topic: c.topic(), group: c.topic(), n: records, lines: linesOf(c.name, records), limit: limit,
	}
}

func linesOf(name string, n int) []string {
	var lines []string
	for i := range n {
		lines = append(lines, fmt.Sprintf("record %d of %s", i, name))
	}
	return lines
}

// produces: what the client was given is in the topic, exactly once.
func produces(ctx context.Context, r *rig, c *client) error {
	if c.produce == "" {
		return errNotApplicable
	}
	o := r.run(ctx, c.call("produce", c.produce))
	if o.err != nil {
		return o.failure("it failed")
	}
	got, err := r.read(ctx, c.topic())
	if err != nil {
		return err
	}
	return c.compare(got)
}

// compare compares records with those the client was given. The performance tool draws from its file at random.
func (c *client) compare(got []string) error {
	want := linesOf(c.name, records)
	if strings.Contains(c.produce, "{lines}") {
		for _, value := range got {
			if !slices.Contains(want, value) {
				return fmt.Errorf("the record %q was never produced", value)
			}
		}
		if len(got) != records {
			return fmt.Errorf("got %d records, want %d", len(got), records)
		}
		return nil
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return fmt.Errorf("got %d records, want %d, each of those produced once:\n%q", len(got), len(want), got)
	}
	return nil
}

// consumesInAGroup: a member of a group gets all that is in the topic.
func consumesInAGroup(ctx context.Context, r *rig, c *client) error {
	switch {
	case c.members != "":
		return showsCommittedOffsets(ctx, r, c)
	case c.consume == "":
		return errNotApplicable
	}
	o := r.run(ctx, c.call("group", c.consume))
	if o.err != nil {
		return o.failure("it failed")
	}
	if c.counts {
		// The line of results: start, end, MB, MB/s, records, …
		lines := strings.Split(strings.TrimSpace(o.out), "\n")
		if fields := strings.Split(lines[len(lines)-1], ", "); len(fields) < 5 || fields[4] != strconv.Itoa(records) {
			return o.failure("it consumed other than %d records", records)
		}
		return nil
	}
	return c.compare(strings.Split(strings.TrimSuffix(o.out, "\n"), "\n"))
}

// consumesWhatItMaySee: a regular expression stands for the topics that a member may describe.
func consumesWhatItMaySee(ctx context.Context, r *rig, c *client) error {
	if c.match == "" {
		return errNotApplicable
	}
	call := c.call("regex", c.match)
	call.group += "-regex"
	o := r.run(ctx, call)
	if o.err != nil {
		return o.failure("it failed")
	}
	return c.compare(strings.Split(strings.TrimSuffix(o.out, "\n"), "\n"))
}

func showsCommittedOffsets(ctx context.Context, r *rig, c *client) error {
	o := r.run(ctx, c.call("group", c.members))
	row := regexp.MustCompile(regexp.QuoteMeta(c.topic()) + `\s+0\s+` + strconv.Itoa(committed) + `\s`)
	if o.err != nil || !row.MatchString(o.out) {
		return o.failure("it shows no offset %d of partition 0 of %s", committed, c.topic())
	}
	return nil
}

// seesOnlyWhatIsPermitted: lists hold its own and not what the policy hides.
func seesOnlyWhatIsPermitted(ctx context.Context, r *rig, c *client) error {
	if c.list == "" {
		return errNotApplicable
	}
	hidden := forbidden
	if c.seesGroups {
		hidden = forbiddenGroup
	}
	o := r.run(ctx, c.call("list", c.list))
	switch {
	case o.err != nil:
		return o.failure("it failed")
	case !strings.Contains(o.out, c.topic()):
		return o.failure("%s is not in its list", c.topic())
	case strings.Contains(o.out, hidden):
		return fmt.Errorf("%s is in its list", hidden)
	}
	return nil
}

// isRefusedToWrite: the client says in its own words that it is not authorized, and nothing was written.
func isRefusedToWrite(ctx context.Context, r *rig, c *client) error {
	if c.produce == "" {
		return errNotApplicable
	}
	if err := c.isRefused(ctx, r, "write denied", cmp.Or(c.write, c.produce)); err != nil {
		return err
	}
	got, err := r.read(ctx, forbidden)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(got, func(v string) bool { return strings.HasSuffix(v, " of "+c.name) }) {
		return fmt.Errorf("it was refused, but its records are in %s", forbidden)
	}
	return nil
}

// isRefusedToRead: the client says in its own words that it is not authorized, and has read nothing.
func isRefusedToRead(ctx context.Context, r *rig, c *client) error {
	command := cmp.Or(c.consume, c.reset)
	if command == "" {
		return errNotApplicable
	}
	return c.isRefused(ctx, r, "read denied", command)
}

func (c *client) isRefused(ctx context.Context, r *rig, check, command string) error {
	call := c.call(check, command)
	call.topic, call.group, call.n = forbidden, c.topic()+"-denied", 1
	call.limit, call.until = deniedLimit, c.denied
	o := r.run(ctx, call)
	switch {
	case strings.Contains(o.out, secret):
		return errors.New("it read what it must not see")
	case !c.denied.MatchString(o.all):
		return o.failure("it did not say %q", c.denied)
	}
	return nil
}
