package node

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestAHookIsAnsweredWhenItsProcessIsEnrolled(t *testing.T) {
	for name, test := range map[string]struct {
		query    string
		answer   func() error
		code     int
		body     string
		enrolled int
	}{
		"a process":        {"?pid=42", nil, http.StatusNoContent, "", 1},
		"a failure":        {"?pid=42", func() error { return errors.New("no memory") }, 500, "process 42: no memory", 0},
		"no process":       {"", nil, http.StatusBadRequest, "not a process id", 0},
		"process 0":        {"?pid=0", nil, http.StatusBadRequest, "not a process id", 0},
		"a path for a pid": {"?pid=../1", nil, http.StatusBadRequest, "not a process id", 0},
		"a thread too far": {"?pid=4294967296", nil, http.StatusBadRequest, "not a process id", 0},
	} {
		e := &fakeEnroller{answer: test.answer}
		w := httptest.NewRecorder()
		enrolHandler(e)(w, httptest.NewRequest(http.MethodPost, "/v1/enrol"+test.query, nil))
		if w.Code != test.code || !strings.Contains(w.Body.String(), test.body) || len(e.enrolled) != test.enrolled {
			t.Errorf("%s: %d %q, %d enrolled", name, w.Code, w.Body, len(e.enrolled))
		}
	}
}
