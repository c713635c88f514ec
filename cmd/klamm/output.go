package main

import (
	"encoding/json"
	"errors"
	"io"

	"github.com/spf13/cobra"
)

// format is the value of the flag -o.
type format string

const (
	textFormat format = "text"
	jsonFormat format = "json"
)

// String is the flag's value.
func (f *format) String() string { return string(*f) }

// Type is what --help calls the flag's value.
func (f *format) Type() string { return "text|json" }

// Set reads the flag's value.
func (f *format) Set(word string) error {
	switch *f = format(word); *f {
	case textFormat, jsonFormat:
		return nil
	}
	return errors.New("want text or json")
}

// outputFlag adds -o to a command.
func outputFlag(cmd *cobra.Command) *format {
	f := textFormat
	cmd.Flags().VarP(&f, "output", "o", "how to print the result")
	return &f
}

// print writes v as JSON, or as the text function does.
func (f *format) print(out io.Writer, v any, text func(io.Writer) error) error {
	if *f == textFormat {
		return text(out)
	}
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
