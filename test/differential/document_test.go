package main

import (
	"os"
	"testing"
)

func TestThePageIsWhatTheTableAndTheReportGive(t *testing.T) {
	r, err := readReport()
	if err != nil {
		t.Fatal(err)
	}
	want, err := r.document()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(documentFile)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what they give: go run ./test/differential -doc", documentFile)
	}
}

func TestAReportOfAnotherTableMakesNoPage(t *testing.T) {
	r, err := readReport()
	if err != nil {
		t.Fatal(err)
	}
	r.APIs["Fetch"].Versions = "4-17"
	if _, err := r.document(); err == nil {
		t.Error("a page is made for versions that no run asked")
	}
}
