package kafka

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// A class data sharing archive (JEP 350, Java 13) halves the start of a broker or tool. It is kept beside the classes,
// is used when it is there, and a Java runtime that it does not fit ignores it.
func archiveOf(dir string) string { return filepath.Join(dir, "classes.jsa") }

// The Java runtime warns on standard output of every class it cannot archive and of an archive it ignores.
const noArchiveLog = "-Xlog:cds=off"

func useArchive(dir string) []string {
	if _, err := os.Stat(archiveOf(dir)); err != nil {
		return nil
	}
	return []string{"-XX:SharedArchiveFile=" + archiveOf(dir), noArchiveLog}
}

// ArchiveTool runs a tool of the classes in dir once, so that tools of this directory start faster from then on.
func ArchiveTool(ctx context.Context, dir, class string, args ...string) error {
	draft := archiveOf(dir) + ".draft"
	options := append([]string{"-XX:ArchiveClassesAtExit=" + draft, noArchiveLog}, quiet...)
	if out, err := java(ctx, jars(dir), toolHeap, options, append([]string{class}, args...)).CombinedOutput(); err != nil {
		return fmt.Errorf("archive the classes of %s: %w\n%s", class, err, out)
	}
	return os.Rename(draft, archiveOf(dir))
}

// archive returns the options by which a broker uses the archive of its classes, or writes it when it ends. What more
// it has on its class path is not in the way of using it, but of writing one for others.
func (c *Cluster) archive(b *broker) []string {
	if use := useArchive(c.classes); use != nil || b != c.brokers[0] || c.receiver != "" {
		return use
	}
	return []string{"-XX:ArchiveClassesAtExit=" + c.archiveDraft(), noArchiveLog}
}

func (c *Cluster) archiveDraft() string {
	return fmt.Sprintf("%s.%d", archiveOf(c.classes), os.Getpid())
}

// keepArchive publishes what the first broker wrote when it ended. A killed one wrote nothing, and one that never
// served has seen too few classes.
func (c *Cluster) keepArchive(b *broker) error {
	if b != c.brokers[0] {
		return nil
	}
	if !c.served {
		return os.RemoveAll(c.archiveDraft())
	}
	if err := os.Rename(c.archiveDraft(), archiveOf(c.classes)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
