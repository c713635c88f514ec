package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"klamm/test/kafka"
)

// stageKafka makes in a directory what the tests take for a Kafka distribution (KAFKA_PATH), as far as they use it.
func stageKafka(dir string) error {
	from, err := kafka.ToolsDir()
	if err != nil {
		return err
	}
	libs := filepath.Join(dir, "libs")
	if err := os.CopyFS(libs, os.DirFS(from)); err != nil {
		return err
	}
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	java := kafka.JavaTool(libs)
	classes := len(java) - 1
	command := fmt.Sprintf("#!/bin/sh\nexec %s '%s'", strings.Join(java[:classes], " "), java[classes])
	for name, class := range map[string]string{
		"kafka-acls.sh": " " + kafka.ACLCommand, "kafka-topics.sh": " " + kafka.TopicCommand,
		"kafka-run-class.sh": `:"$CLASSPATH"`,
	} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte(command+class+" \"$@\"\n"), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// stage makes the suite's directory: the tests, and for each of their processes, beside it, what it looks for in
// ../src and java. The Java programs are compiled by the runtime, as only the JDK has the command for it.
func (s *suite) stage(ctx context.Context) error {
	cache, err := kafka.Cache()
	if err != nil {
		return err
	}
	from := filepath.Join(cache, "librdkafka", s.librdkafka)
	if err := os.CopyFS(filepath.Join(s.dir, "src"), os.DirFS(from)); err != nil {
		return fmt.Errorf("find the tests of librdkafka: %w: run scripts/setup librdkafka", err)
	}
	sources, err := filepath.Glob(filepath.Join(s.java(), "*.java"))
	if err != nil {
		return err
	}
	client := filepath.Join(s.kafkaPath, "libs", "kafka-clients-"+kafka.ToolsVersion+".jar")
	compile := exec.CommandContext(ctx, "java", append([]string{"--module", "jdk.compiler/com.sun.tools.javac.Main",
		"-nowarn", "-classpath", client}, sources...)...)
	if out, err := compile.CombinedOutput(); err != nil {
		return fmt.Errorf("compile the Java programs of the tests: %w\n%s", err, out)
	}
	return nil
}

// java is where the tests' Java programs are.
func (s *suite) java() string { return filepath.Join(s.dir, "src", "java") }
